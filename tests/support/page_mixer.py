"""The mixer of docs/adding-a-mixer.md, as a module of a user's own."""

from run_page import code_of

exec(compile(code_of("adding-a-mixer.md")[1]["leaky.py"], "docs/adding-a-mixer.md", "exec"))
