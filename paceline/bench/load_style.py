"""The style sheet of the load report: system fonts, light and dark."""

CSS = """\
:root {
  --paper: #fbfbfa; --card: #fff; --ink: #1d2327; --soft: #667079; --hair: #e4e6e8; --good: #2f9e62; --bad: #d64545;
  --base: #98a1a8; --c0: #2563c9; --c1: #d9730d; --c2: #1a936f; --c3: #9a4fc4; --c4: #c2374f; --c5: #0e8aa3; --c6:
    #8a7300;
  --c7: #6b5bd2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1b1f23; --ink: #e6e9eb; --soft: #98a3ab; --hair: #2d3338; --good: #35a86b; --bad:
      #e05d5d;
    --base: #7d8890; --c0: #6ea3f5; --c1: #f2a356; --c2: #4cc9a0; --c3: #c48be8; --c4: #ee7388; --c5: #4fc3dc; --c6:
      #d6bd45;
    --c7: #a79bf5;
  }
}
.base { --c: var(--base); } .s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c:
  var(--c3); }
.s4 { --c: var(--c4); } .s5 { --c: var(--c5); } .s6 { --c: var(--c6); } .s7 { --c: var(--c7); }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans",
  sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1280px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 40px 0 2px; } h3 { font-size: 15px; margin: 22px 0 8px; }
p { margin: 0 0 10px; color: var(--soft); max-width: 80ch; }
.warning { color: var(--bad); font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 6px 0 0; padding: 8px 0; list-style: none;
  position: sticky; top: 0; background: var(--paper); z-index: 1; }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; background: var(--c); margin-right: 7px; }
.keys { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12px; color: var(--soft); padding: 2px 8px 4px; }
.grid-of { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 14px; align-items: start; }
figure { margin: 0; background: var(--card); border: 1px solid var(--hair); border-radius: 10px; padding: 12px 10px
  8px; }
figcaption { font-size: 13px; font-weight: 600; padding: 0 6px 6px; }
.empty { font-size: 13px; padding: 0 6px; }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--hair); fill: none; } .mark { stroke: var(--soft); stroke-dasharray: 4 4; fill: none; }
.line { stroke: var(--c); stroke-width: 2; fill: none; stroke-linejoin: round; stroke-linecap: round; }
.line.base { stroke-dasharray: 6 4; } .line.thin { stroke-width: 1; opacity: 0.5; }
.track { fill: var(--hair); opacity: 0.5; }
.dot { fill: var(--c); fill-opacity: 0.85; } .bar { fill: var(--c); }
.whisker { stroke: var(--c, var(--ink)); stroke-width: 1.5; opacity: 0.6; fill: none; }
text { font-size: 11px; fill: var(--soft); } .mid { text-anchor: middle; } .end { text-anchor: end; }
text.name, text.value { fill: var(--ink); }
details { border-top: 1px solid var(--hair); padding: 10px 0; } summary { cursor: pointer; font-weight: 600; padding:
  4px 0 10px; }
table { border-collapse: collapse; font-size: 13.5px; }
th { font-weight: 500; text-align: left; color: var(--soft); } td { text-align: right; white-space: nowrap; }
th, td { padding: 6px 10px; } small { display: block; font-size: 11px; color: var(--soft); }
.pair { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 14px 40px; margin-top: 26px; }
.verdict caption { text-align: left; font-weight: 600; padding-bottom: 4px; } .verdict th { color: var(--ink); }
.verdict td { text-align: center; min-width: 74px; font-size: 16px; font-weight: 600; border: 2px solid var(--paper);
  border-radius: 8px; } .verdict td small { font-weight: 400; color: var(--ink); opacity: 0.75; }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--hair); border-radius: 10px; padding: 6px; }
.all tr:first-child th { vertical-align: bottom; } .all tr:not(:first-child) th { white-space: nowrap; }
.all th:nth-child(2) { color: var(--ink); white-space: nowrap; }
.all tr.first th, .all tr.first td { border-top: 1px solid var(--hair); } .bad { color: var(--bad); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 20px; font-size: 13.5px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; } code { font: 12.5px ui-monospace, "DejaVu Sans
  Mono", monospace; }
@media (max-width: 560px) { main { padding: 20px 12px 40px; } dl { grid-template-columns: 1fr; gap: 2px; } dd {
  margin-bottom: 8px; } }
"""
