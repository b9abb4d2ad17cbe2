(function () {
  "use strict";
  var WORDS = { along: "x", quantity: "show", chosen: "case" };
  function word(name) { return WORDS[name] || (name.indexOf("at_") === 0 ? name.slice(3) : ""); }
  function suiteOf(place) { return place.id.replace(/^chart-/, ""); }
  function asked() {
    var found = new URLSearchParams(location.hash.slice(1));
    return found.get("suite") ? found : null;
  }
  function write(place, state) {
    var found = new URLSearchParams({ suite: suiteOf(place) });
    Object.keys(state).forEach(function (name) { if (state[name] !== "") { found.set(name, state[name]); } });
    history.replaceState(null, "", "#" + found.toString());
  }
  function take(spec, place) {
    // The address wins over what the chart shows at first; it is read before the chart is drawn.
    var wanted = asked(), state = {};
    if (!wanted || wanted.get("suite") !== suiteOf(place)) { wanted = new URLSearchParams(); }
    var hidden = (wanted.get("hide") || "").split(",").filter(Boolean);
    (spec.params || []).forEach(function (param) {
      var name = word(param.name);
      if (param.bind && param.bind.options && name) {
        if (param.bind.options.indexOf(wanted.get(name)) >= 0) { param.value = wanted.get(name); }
        state[name] = param.value;
      } else if (param.name === "shown") {
        state.all = param.value.map(function (item) { return item.impl; });
        param.value = param.value.filter(function (item) { return hidden.indexOf(item.impl) < 0; });
        state.hide = hidden.join(",");
      }
    });
    return state;
  }
  function draw(place) {
    var spec = JSON.parse(place.firstElementChild.textContent), state = take(spec, place), all = state.all || [];
    delete state.all;
    var actions = { export: true, source: false, compiled: false, editor: false };
    var shown = all.filter(function (impl) { return (state.hide || "").split(",").indexOf(impl) < 0; });
    choose(place, all, shown, state);
    vegaEmbed(place, spec, { renderer: "svg", actions: actions, downloadFileName: place.id }).then(function (drawn) {
      label(place);
      (spec.params || []).forEach(function (param) {
        var name = word(param.name);
        if (param.bind && param.bind.options && name) {
          drawn.view.addSignalListener(param.name, function (_, value) { state[name] = value; write(place, state); });
        } else if (param.name === "shown") {
          drawn.view.addSignalListener("shown", function (_, value) {
            var left = (value && value.impl) || [];
            state.hide = all.filter(function (impl) { return left.indexOf(impl) < 0; }).join(",");
            write(place, state);
            choose(place, all, left, state);
          });
        }
      });
    }).catch(function (error) {
      place.textContent = "This chart cannot be drawn: " + error.message;
      console.error(error);
    });
  }
  function choose(place, all, shown, state) {
    // What a click in the legend does, for keyboards, screen readers and fingers.
    var box = place.previousElementSibling;
    if (all.length < 2) { return; }
    if (!box || !box.matches(".names")) {
      box = document.createElement("details");
      box.className = "names screen small";
      box.append(document.createElement("summary"));
      box.firstChild.textContent = "Choose implementations";
      all.forEach(function (impl) {
        var name = document.createElement("label"), tick = document.createElement("input");
        tick.type = "checkbox";
        tick.value = impl;
        name.append(tick, " " + impl);
        box.append(name);
      });
      place.before(box);
    }
    var ticks = Array.from(box.querySelectorAll("input"));
    ticks.forEach(function (tick) { tick.checked = shown.indexOf(tick.value) >= 0; });
    box.onchange = function () {
      state.hide = ticks.filter(function (tick) { return !tick.checked; }).map(function (tick) { return tick.value; }).join(",");
      write(place, state);
      draw(redo(place));
    };
  }
  function label(place) {
    place.querySelectorAll("summary").forEach(function (node) { node.setAttribute("aria-label", "Save this chart"); });
    place.querySelectorAll(".vega-bind").forEach(function (row) {
      var name = row.querySelector(".vega-bind-name"), menu = row.querySelector("select, input");
      if (name && menu) { menu.setAttribute("aria-label", name.textContent.trim()); }
    });
    var heading = place.closest("section, main").querySelector("h3, h2");
    var drawing = place.querySelector("svg.marks");
    if (drawing) {
      // Containers of marks have a role but no name; what can be named are the marks in them.
      drawing.querySelectorAll("[role]:not([aria-label])").forEach(function (node) {
        ["role", "aria-roledescription"].forEach(function (name) { node.removeAttribute(name); });
      });
    }
    if (drawing && heading) {
      drawing.setAttribute("role", "img");
      drawing.setAttribute("aria-label", "Chart: " + heading.textContent.trim() + "; its figures are in the table of this page");
    }
  }
  var near = new IntersectionObserver(function (entries) {
    entries.filter(function (entry) { return entry.isIntersecting; }).forEach(function (entry) {
      near.unobserve(entry.target);
      draw(entry.target);
    });
  }, { rootMargin: "1500px" });
  var places = document.querySelectorAll(".chart:not(.drawn)");
  places.forEach(function (place) { near.observe(place); });
  addEventListener("beforeprint", function () {
    document.querySelectorAll("details.folded").forEach(function (part) { part.open = true; });
    near.takeRecords();
    places.forEach(function (place) { if (!place.classList.contains("vega-embed")) { near.unobserve(place); draw(place); } });
  });
  function follow() {
    var wanted = asked(), place = wanted && document.getElementById("chart-" + wanted.get("suite"));
    if (!place) { return; }
    if (place.classList.contains("vega-embed")) { draw(redo(place)); }
    place.closest("section").scrollIntoView();
  }
  function redo(place) {
    var data = place.querySelector("script") || kept[place.id];
    place.replaceChildren(data);
    return place;
  }
  var kept = {};
  places.forEach(function (place) { kept[place.id] = place.firstElementChild.cloneNode(true); });
  addEventListener("hashchange", follow);
  follow();

  var samples = document.getElementById("samples-of");
  if (!samples) { return; }
  var rows = null, specs = null;
  var menus = Array.from(samples.querySelectorAll("select")), levels = menus.map(function (menu) { return menu.dataset.level; });
  function fits(row, count) { return levels.slice(0, count).every(function (level, i) { return row[level] === menus[i].value; }); }
  function fill(from) {
    for (var i = from; i < menus.length; i++) {
      var names = new Set(rows.filter(function (row) { return fits(row, i); }).map(function (row) { return row[levels[i]]; }));
      var before = menus[i].value;
      menus[i].replaceChildren.apply(menus[i], Array.from(names, function (name) { return new Option(name, name); }));
      if (names.has(before)) { menus[i].value = before; }
    }
    show();
  }
  function show() {
    var row = rows.find(function (row) { return fits(row, levels.length); });
    samples.querySelector("[data-said]").textContent = row.said;
    var values = row.of.map(function (share, turn) { return { turn: turn, seconds: share * 1e-4 * row.s }; });
    Object.keys(specs).forEach(function (name) {
      var spec = Object.assign({}, specs[name], { datasets: { samples: values } });
      vegaEmbed("#" + name, spec, { renderer: "svg", actions: false }).then(function () { label(document.getElementById(name)); });
    });
  }
  function start() {
    if (rows) { return; }
    rows = JSON.parse(samples.querySelector("[data-rows]").textContent);
    specs = JSON.parse(samples.querySelector("[data-specs]").textContent);
    fill(0);
  }
  menus.forEach(function (menu, i) { menu.addEventListener("change", function () { fill(i + 1); }); });
  new IntersectionObserver(function (entries, observer) {
    if (entries.some(function (entry) { return entry.isIntersecting; })) { observer.disconnect(); start(); }
  }, { rootMargin: "800px" }).observe(samples);
  addEventListener("beforeprint", start);
})();
