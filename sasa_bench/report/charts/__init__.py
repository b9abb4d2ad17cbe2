"""Interactive charts as Vega-Lite specifications."""
