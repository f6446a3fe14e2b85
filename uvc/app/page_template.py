"""The page of `uvc report --html`: style and order; light or dark as the reader's system is."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>UVC report: {{ runs | length }} run{{ "s" if runs | length > 1 }}</title>
<style>
:root { color-scheme: light dark; --ink: #22262b; --faint: #5d656e; --page: #fff; --card: #f4f5f7;
  --line: #d3d8de; --c0: #3b6fb6; --c1: #d9822b; --c2: #3a8f6b; --c3: #a4509c; --c4: #b8433f; --c5: #6d6d6d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --faint: #9aa3ad; --page: #15181c;
  --card: #1e2329; --line: #39414a; --c0: #78a9e6; --c1: #eba45e; --c2: #68bf98; --c3: #cf86c8;
  --c4: #e28480; --c5: #aaa; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 16px; font: 15px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--page); overflow-wrap: anywhere; }
h1 { font-size: 24px; margin: 8px 0; }
h2 { font-size: 19px; margin: 40px 0 8px; }
h3 { font-size: 15px; margin: 0 0 8px; }
p { margin: 8px 0; }
.cards, .charts { display: grid; gap: 12px; }
.cards { grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.card { background: var(--card); border-radius: 8px; padding: 12px 14px; min-width: 0; }
.big { font-size: 26px; font-weight: 600; }
.faint { color: var(--faint); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 6px; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
td + td, th + th { white-space: nowrap; }
.loose td + td { white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
.group th { padding-top: 16px; }
tr:last-child td { border-bottom: 0; }
pre { background: var(--card); padding: 12px 14px; border-radius: 8px; white-space: pre-wrap; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
svg text.small { font-size: 9.5px; fill: var(--faint); }
.frame { fill: none; stroke: var(--faint); }
.grid { fill: none; stroke: var(--line); stroke-width: .5; }
.removed { fill: var(--line); }
.skipped { fill: none; stroke: var(--faint); stroke-dasharray: 4 3; }
polyline { fill: none; stroke-width: 1.6; }
{% for i in range(6) %}.c{{ i }} { fill: var(--c{{ i }}); }
.l{{ i }} { stroke: var(--c{{ i }}); }
{% endfor %}.ring { fill: none; stroke-width: 2; }
</style>
</head>
<body>
<h1>UVC report</h1>
<div class="cards">
{% for run in runs %}<div class="card">
<div class="faint">run {{ run.number }}: {{ run.summary.model }}, {{ run.folder }}</div>
<div class="big">{{ run.rows[0][2] }} % top-1</div>
<div>{{ run.rows[0][3] }} points, {{ run.rows[1][3].removeprefix("× ") }} of the MACs,
{{ run.rows[2][3].removeprefix("× ") }} of the parameters</div></div>
{% endfor %}</div>
{% if accuracy %}<h2>Accuracy over cost and latency</h2>
<div class="charts">{% for title, chart in accuracy %}<div class="card"><h3>{{ title }}</h3>{{ chart }}
<p class="faint">Points: compressed, by the number of the run; rings: their teachers.</p>
</div>{% endfor %}</div>
{% endif %}{% for note in notes %}<p class="faint">{{ note }}</p>{% endfor %}
<h2>Figures</h2>
<table>
<tr><th></th><th>teacher</th><th>compressed</th><th>change</th></tr>
{% for run in runs %}<tr class="group"><th colspan="4">run {{ run.number }}: {{ run.summary.model }}</th></tr>
{% for row in run.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}{% endfor %}</table>
{% for run in runs %}<h2>Run {{ run.number }}: {{ run.summary.model }}</h2>
<p class="faint">{{ run.folder }}</p>
{% if run.missing %}<p>Not in the folder: {{ run.missing | join("; ") }}.</p>{% endif %}
<div class="charts">
{% for title, picture, legend in run.pictures %}<div class="card"><h3>{{ title }}</h3>{{ picture }}
<p class="faint">{{ legend }}</p></div>{% endfor %}
{% for title, chart in run.charts %}<div class="card"><h3>{{ title }}</h3>{{ chart }}</div>{% endfor %}
<div class="card"><h3>How it was made</h3><table class="loose">
{% for name, value in run.facts %}<tr><td>{{ name }}</td><td>{{ value }}</td></tr>{% endfor %}</table></div>
{% if run.compact %}<div class="card"><h3>How it runs</h3><table class="loose">
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
