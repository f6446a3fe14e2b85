"""The page of `uvc report --html`: style and order; light or dark as the reader's system is."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>UVC report: {{ runs | length }} run{{ "s" if runs | length > 1 }}</title>
<style>
:root { color-scheme: light dark; --ink: #22262b; --faint: #68707a; --page: #fff; --card: #f4f5f7;
--line: #d8dce1;
  --c0: #3b6fb6; --c1: #d9822b; --c2: #3a8f6b; --c3: #a4509c; --c4: #b8433f; --c5: #6d6d6d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --faint: #9aa3ad; --page: #15181c;
--card: #1e2329;
  --line: #39414a; --c0: #78a9e6; --c1: #eba45e; --c2: #68bf98; --c3: #cf86c8; --c4: #e28480; --c5: #aaa; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 16px; font: 15px/1.5 system-ui, sans-serif;
color: var(--ink);
  background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 24px; margin: 8px 0; } h2 { font-size: 19px; margin: 32px 0 8px; } h3 { font-size: 15px;
margin: 8px 0; }
.grid-of { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 12px; }
.card { background: var(--card); border-radius: 8px; padding: 12px; min-width: 0; }
.big { font-size: 26px; font-weight: 600; } .faint { color: var(--faint); font-size: 13px; }
.wide { overflow-x: auto; white-space: nowrap; } table { border-collapse: collapse; width: 100%;
font-variant-numeric: tabular-nums; }
th, td { padding: 4px 8px; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child {
  text-align: left; } pre { background: var(--card); padding: 12px; border-radius: 8px; overflow-x: auto; }
svg { width: 100%; height: auto; display: block; } svg text { font: 10px system-ui, sans-serif;
fill: var(--ink); }
svg text.small { font-size: 8px; fill: var(--faint); } .frame { fill: none; stroke: var(--faint); }
.grid { fill: none; stroke: var(--line); stroke-width: .5; } .removed { fill: var(--line); }
.skipped { fill: none; stroke: var(--faint); stroke-dasharray: 4 3; } polyline { fill: none;
stroke-width: 1.6; }
{% for i in range(6) %}.c{{ i }} { fill: var(--c{{ i }}); } .l{{ i }} { stroke: var(--c{{ i }}); }
{% endfor %}
</style>
</head>
<body>
<h1>UVC report</h1>
<div class="grid-of">
{% for run in runs %}<div class="card">
<div class="faint">run {{ run.number }}: {{ run.summary.model }}, {{ run.folder }}</div>
<div class="big">{{ run.rows[0][2] }} % top-1</div>
<div>{{ run.rows[0][3] }} points, {{ run.rows[1][3] }} of the MACs, {{ run.rows[2][3] }}
of the parameters</div></div>
{% endfor %}</div>
{% if accuracy %}<h2>Accuracy over cost and latency</h2>
<div class="grid-of">{% for title, chart in accuracy %}<div class="card"><h3>{{ title }}</h3>{{ chart }}
</div>{% endfor %}</div>
{% endif %}{% for note in notes %}<p class="faint">{{ note }}</p>{% endfor %}
<h2>Figures</h2>
<div class="wide"><table>
<tr><th>run</th><th></th><th>teacher</th><th>compressed</th><th>difference</th></tr>
{% for run in runs %}{% for row in run.rows %}<tr><td>{{ run.number if loop.first }}</td>
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}{% endfor %}</table></div>
{% for run in runs %}<h2>Run {{ run.number }}: {{ run.summary.model }}</h2>
<p class="faint">{{ run.folder }}</p>
{% if run.missing %}<p>Not in the folder: {{ run.missing | join("; ") }}.</p>{% endif %}
<div class="grid-of">
{% if run.structure %}<div class="card"><h3>What each block keeps</h3>{{ run.structure }}
<p class="faint">Blue: q/k dims, orange: v dims, green: neurons; grey: removed.</p></div>{% endif %}
{% for title, chart in run.charts %}<div class="card"><h3>{{ title }}</h3>{{ chart }}</div>{% endfor %}
<div class="card"><h3>How it was made</h3><table>
{% for name, value in run.facts %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table></div>
{% if run.compact %}<div class="card"><h3>How it runs</h3><table>
{% for name, value in run.compact %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table></div>
{% endif %}
</div>
<h3>How to load it</h3>
<pre>import uvc
model = uvc.load({{ run.quoted }})  # eval mode; model(images) gives logits</pre>
{% endfor %}
</body>
</html>
"""
