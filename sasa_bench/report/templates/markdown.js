(function () {
  "use strict";
  function words(node) {
    return Array.from(node.childNodes).map(function (child) {
      if (child.nodeType === Node.TEXT_NODE) { return child.textContent; }
      if (child.nodeType !== Node.ELEMENT_NODE || child.matches("button, select, input, .dtcc, .dt-column-order")) { return ""; }
      return child.tagName === "CODE" ? "`" + child.textContent + "`" : words(child);
    }).join("").replace(/\s+/g, " ");
  }
  function cell(node) { return words(node).trim().replace(/\|/g, "\\|"); }
  function line(cells) { return "| " + cells.join(" | ") + " |"; }
  function library() {
    // itables publishes DataTables as a module under a name with its version, once it is loaded.
    var name = Object.keys(window).find(function (key) { return /^_itables_/.test(key); });
    return Promise.resolve(name ? window[name] : null);
  }
  function ofTable(table, module) {
    var head = [], body = [], $ = module && module.jQuery;
    var api = $ && $.fn.dataTable && $.fn.dataTable.isDataTable(table) ? $(table).DataTable() : null;
    if (api) {
      head = api.columns().titles().toArray();
      body = api.rows({ search: "applied", order: "applied" }).data().toArray().map(function (row) {
        return Array.from(row).map(function (value) { return value === null || String(value) === "NaN" ? "" : String(value).replace(/\|/g, "\\|"); });
      });
    } else {
      var rows = Array.from(table.rows).map(function (row) { return Array.from(row.cells).map(cell); });
      head = table.tHead ? rows.shift() : rows[0].map(function () { return ""; });
      body = rows;
    }
    return [line(head), line(head.map(function () { return "---"; }))].concat(body.map(line)).join("\n") + "\n";
  }
  function ofCard(card) {
    return Array.from(card.querySelectorAll("h3, dt, dd")).map(function (node) {
      var text = words(node).trim();
      return node.tagName === "H3" ? "### " + text + "\n" : node.tagName === "DT" ? "\n**" + text + "**\n" : "- " + text;
    }).join("\n") + "\n";
  }
  function put(text) {
    if (navigator.clipboard && isSecureContext) { return navigator.clipboard.writeText(text).catch(function () { old(text); }); }
    old(text);
    return Promise.resolve();
  }
  function old(text) {
    var area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  window.asMarkdown = function (node) {
    return library().then(function (module) { return node.tagName === "TABLE" ? ofTable(node, module) : ofCard(node); });
  };
  function add(place, what, name) {
    var button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy as Markdown";
    button.setAttribute("aria-label", "Copy " + name + " as Markdown");
    button.addEventListener("click", function () {
      asMarkdown(what()).then(put).then(function () {
        button.textContent = "Copied";
        setTimeout(function () { button.textContent = "Copy as Markdown"; }, 1500);
      });
    });
    place.prepend(button);
  }
  document.querySelectorAll(".card").forEach(function (card) {
    if (card.querySelector("dl")) { add(card, function () { return card; }, "the answer"); }
  });
  function heading(node) {
    for (var at = node; at; at = at.previousElementSibling || at.parentElement) { if (/^H[1-3]$/.test(at.tagName)) { return at; } }
    return document.querySelector("h1");
  }
  document.querySelectorAll("table.plain, table.dataTable, table[id]").forEach(function (table) {
    var identity = table.id, above = heading(table);
    if (!above || above.querySelector("button.copy")) { return; }
    add(above, function () { return identity ? document.getElementById(identity) : table; }, "the table");
  });
})();
