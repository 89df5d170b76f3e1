"""The recipe and the configuration as the design writes them, every key with its default."""

from __future__ import annotations

RECIPE = """
model = "ollama:qwen3:8b"        # ollama:NAME | hf:ORG/REPO[@COMMIT] | a folder | a .gguf file
name  = "qwen3-abliterated:8b"
replace = false                  # overwrite a model of that name that we did not make
force = false
[prompts]
harmful = "builtin"
harmless = "builtin"
atoms = []
count = 128
seed = 0
system = ""
[direction]
method = "auto"
layer = 0.6
index = "auto"
position = -1
rank = 1
convention = "output"
orthogonalize = true
winsorize = 1.0
file = ""
[edit]
strength = 1.0
attention = 1.0
mlp = 1.0
norm = "columns"
layers = "all"
kernel = "constant"
center = 0.5
width = 0.4
floor = 0.0
post_norm = true
embeddings = false
invert = false
[search]
trials = 60
refusal_target = 0.03
[evaluate]
prompts = 100
tokens = 128
judge = ""
keep_answers = false
suites = []
[export]
format = "gguf"
quantize = "keep"
template_from = ""
tool_template = true
register = true
allow_partial = false
[run]
device = "auto"
dtype = "auto"
from_checkpoint = ""
[schedule]
window = ""
not_before = ""
after = []
when = "any"
priority = 0
hold = false
"""

CONFIG = """
[paths]
state = ""
spool = ""
models = []
[proxy]
listen = "127.0.0.1:11434"
upstream = "http://127.0.0.1:11435"
patterns = ["*-abliterated"]
aliases = {}
during_jobs = "share"
hold_seconds = 60
auto_submit = false
[engine]
kind = "auto"
[jobs]
executor = "local"
retries = 5
keep_days = 90
on_finish = []
[control]
socket = ""
tcp = ""
[trust]
remote_code = []
"""
