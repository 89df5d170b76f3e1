"""The page's style sheet: one column on a phone, two on a desk, light and dark as the reader's system has it.

Colours are variables; text keeps AA contrast in both themes (a test computes it). Does not know what is drawn.
"""

from __future__ import annotations

from typing import Final

LIGHT: Final = {
    "paper": "#fbfaf7",
    "card": "#ffffff",
    "ink": "#1d2126",
    "soft": "#565d66",
    "rule": "#e3e0d8",
    "grid": "#ebe8e1",
    "harmful": "#b4442c",
    "harmless": "#1f6f8b",
    "accent": "#1f6f5c",
    "warn": "#8a5300",
    "bad": "#a32a1c",
    "wash": "#eef4f0",
}
DARK: Final = {
    "paper": "#15171a",
    "card": "#1d2024",
    "ink": "#e9e7e2",
    "soft": "#a9aeb5",
    "rule": "#33373d",
    "grid": "#2b2f34",
    "harmful": "#f08a6c",
    "harmless": "#6cbcd8",
    "accent": "#63c7a8",
    "warn": "#e5ad58",
    "bad": "#f58a7a",
    "wash": "#1e2a27",
}


def _variables(colours: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


STYLE: Final = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:clamp(1.5rem,4.5vw,2.2rem);line-height:1.2;margin:0;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:48px 0 6px;letter-spacing:-.01em}
h3{font-size:1rem;margin:0 0 4px}
p{margin:6px 0;max-width:70ch}
.lede,.note,figcaption,caption,.soft{color:var(--soft)}
.lede{margin-top:8px;overflow-wrap:anywhere}
code{font:.86em/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,210px),1fr));gap:14px;margin:28px 0 8px}
.tile,.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px 18px}
.tile b{display:block;font-size:1.75rem;line-height:1.2;letter-spacing:-.02em;font-variant-numeric:tabular-nums;
 font-weight:650}
.tile>span{color:var(--soft);font-size:.9rem;display:block}
.tile .was{color:var(--soft);font-size:1.1rem;font-weight:450}
.good b,.ok{color:var(--accent)}.poor b,.miss{color:var(--warn)}.bad{color:var(--bad)}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px;margin-top:14px}
figure{margin:0}
figure svg{width:100%;height:auto;display:block;margin-top:8px}
figcaption,.note,caption{font-size:.88rem;line-height:1.45}
.scroll{overflow-x:auto;margin-top:12px}
.scroll:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.95rem}
caption{text-align:left;padding:0 0 8px}
th,td{padding:8px 12px 8px 0;text-align:left;border-bottom:1px solid var(--rule);vertical-align:baseline}
thead th{font-weight:550;color:var(--soft);font-size:.88rem}
tbody th{font-weight:450}
td.n,th.n{text-align:right}td.n{white-space:nowrap}
tr:last-child>*{border-bottom:0}
td small{color:var(--soft);white-space:nowrap}td bdi{overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:minmax(8em,auto) 1fr;gap:6px 18px;margin:10px 0 0;font-size:.95rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;min-width:0}
ul.notes{padding-left:1.1em;margin:10px 0}ul.notes li{margin:5px 0;overflow-wrap:anywhere}
ul.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;padding:0;margin:6px 0 0;font-size:.88rem;
 color:var(--soft)}
ul.legend svg{width:12px;height:12px;display:inline;margin:0;vertical-align:-1px}
details{margin-top:10px}summary{cursor:pointer;color:var(--soft)}
footer{margin-top:56px;padding-top:14px;border-top:1px solid var(--rule);color:var(--soft);font-size:.88rem}
svg text{font-size:12.5px;fill:var(--soft);font-variant-numeric:tabular-nums}
svg text.title{fill:var(--ink)}
svg text.over{paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
.grid{stroke:var(--grid);stroke-width:1}.tick,.axis{stroke:var(--soft);stroke-width:1}
.target{stroke:var(--warn);stroke-width:1.5;stroke-dasharray:5 4}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.harmful-line{stroke:var(--harmful)}
.whisker{stroke-width:4;stroke-linecap:round;opacity:.4}
.whisker.before{stroke:var(--harmful)}.whisker.after{stroke:var(--accent)}
.dot.before,.dot.harmful{fill:var(--harmful)}.dot.after{fill:var(--accent)}
.dot.trial{fill:var(--harmless);fill-opacity:.7}.dot.trial.few{fill-opacity:.35}.dot.verified{fill-opacity:1}
.picked-dot{fill:var(--accent);stroke:var(--card);stroke-width:2}
.picked{fill:none;stroke:var(--ink);stroke-width:2}
.cell{fill:var(--harmless)}.cell.faint{fill-opacity:.12}
.bar.harmful{fill:var(--harmful);fill-opacity:.6}.bar.harmless{fill:var(--harmless);fill-opacity:.6}
.bar.attention{fill:var(--harmless)}.bar.mlp{fill:var(--harmful)}
.bar.residual,.bar.time{fill:var(--accent)}
rect.legend-picked{fill:var(--accent)}rect.legend-cell{fill:var(--harmless)}
svg.interval{width:120px;height:14px;vertical-align:-2px}
@media(max-width:560px){main{padding:24px 16px 48px}svg.interval{display:none}dl{grid-template-columns:1fr;gap:0}
 dd{margin-bottom:8px}th,td{padding-right:8px}.tile,.card{padding:14px}}
@media print{body{background:#fff}.card,.tile{break-inside:avoid}}
"""
)
