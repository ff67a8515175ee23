"""The style sheet of a run's page and the document around its content."""

from __future__ import annotations

from html import escape

# Hues of series keep their order and stay apart for colour-blind readers, in light and dark.
CSS = """
:root{color-scheme:light dark;--page:#fafaf8;--card:#fff;--ink:#1b1b19;--soft:#66655f;
--line:#e2e1dc;--s1:#2a78d6;--s2:#d9622b;--s3:#128a62;--s4:#7a4fd0;--s5:#b8348a;--muted:#b5b4ac;
--bad:#c62f2f;--late:#b97400;--r0:#c4dcf7;--r1:#93c0ef;--r2:#5a9be2;--r3:#2a70c4;--r4:#134784}
@media(prefers-color-scheme:dark){:root{--page:#161614;--card:#1f1f1c;--ink:#ecebe6;--soft:#a3a29a;
--line:#383833;--s1:#5598e7;--s2:#e77b46;--s3:#35b184;--s4:#a184ea;--s5:#dd6bb3;--muted:#66655f;
--bad:#ef6a6a;--late:#e0a030;--r0:#1d3b5f;--r1:#28599a;--r2:#3b7fd0;--r3:#73aaec;--r4:#c0dcfa}}
@media print{:root{--page:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#ccc;--s1:#2a78d6;
--s2:#d9622b;--s3:#128a62;--s4:#7a4fd0;--s5:#b8348a;--muted:#b5b4ac;--bad:#c62f2f;--late:#b97400;
--r0:#c4dcf7;--r1:#93c0ef;--r2:#5a9be2;--r3:#2a70c4;--r4:#134784;color-scheme:light}}
*{box-sizing:border-box;print-color-adjust:exact;-webkit-print-color-adjust:exact}
body{margin:0;background:var(--page);color:var(--ink);
font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1160px;margin:0 auto;padding:24px 20px 48px}
h1{font-size:24px;margin:0;overflow-wrap:anywhere}h2{font-size:17px;margin:32px 0 10px}
h3{font-size:14px;margin:18px 0 6px}p{margin:4px 0}.sub{color:var(--soft)}
.state{display:inline-block;padding:1px 10px;border-radius:10px;border:1px solid currentColor;
margin:8px 0 14px}.done{color:var(--s3)}.open{color:var(--late)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.tiles div,figure{background:var(--card);border:1px solid var(--line);border-radius:8px}
.tiles div{padding:8px 12px;display:flex;flex-direction:column}
.tiles span,.tiles small{color:var(--soft)}.tiles b{font-size:22px;font-weight:600}
.warning{border-left:4px solid var(--late);background:var(--card);padding:6px 12px;
overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr));gap:12px}
figure{margin:0;padding:10px 12px;break-inside:avoid;min-width:0}
figcaption{margin-bottom:6px}figcaption b{display:block}
.legend{display:flex;flex-wrap:wrap;gap:0 14px;color:var(--soft);font-size:12px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px;
background:var(--c)}.legend i.dash{height:2px;width:14px;vertical-align:4px}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:11px}svg .end{text-anchor:end}svg .centre{text-anchor:middle}
svg .mid{dominant-baseline:central}
.grid{stroke:var(--line);fill:none}.line{stroke:var(--c);stroke-width:2;fill:none;
stroke-linejoin:round}.dot,.bar,.cell{fill:var(--c)}
.mark{stroke:var(--ink);stroke-width:2}.cross{stroke:var(--card);stroke-width:1.2;fill:none}
.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}.s4{--c:var(--s4)}.s5{--c:var(--s5)}
.muted{--c:var(--muted)}.bad{--c:var(--bad)}.late{--c:var(--late)}.dash{--c:var(--ink)}
.r0{--c:var(--r0)}.r1{--c:var(--r1)}.r2{--c:var(--r2)}.r3{--c:var(--r3)}.r4{--c:var(--r4)}
.wide{overflow-x:auto;margin-top:8px}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:3px 8px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top;
font-size:12.5px;white-space:nowrap}.long{white-space:normal;overflow-wrap:anywhere;min-width:220px}
th{color:var(--soft);font-weight:500;font-size:12px;vertical-align:bottom;white-space:normal}
.right{text-align:right}tr{break-inside:avoid}.track{min-width:70px;vertical-align:middle}
.hbar{display:block;height:9px;border-radius:2px;background:var(--c)}
.bars{width:100%}.bars td{border:0;white-space:nowrap}.bars .track{width:100%}
summary{cursor:pointer;color:var(--soft);margin-top:10px}
.columns{columns:2 400px;margin-top:14px}.columns .wide{overflow:visible}
.columns table{width:100%}.columns td:first-child{width:45%}
.columns td{font-size:12px;padding:2px 8px}
@media print{.charts{grid-template-columns:1fr 1fr}.columns{columns:2}h3{break-after:avoid}
main{max-width:none;padding:0}body{font-size:11px}.wide{overflow:visible}
th,td{padding:2px 3px;font-size:9px}.long{min-width:0}.track{min-width:30px}h2{break-after:avoid}}
"""


def document(title: str, body: str) -> str:
    """Return a whole page; its policy forbids scripts and requests of any kind."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
