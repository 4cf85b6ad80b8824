"""lm-evaluation-harness on our engine and over HTTP: its tasks and prompts, our rows.

`run` joins the parts: a plan of tasks (`tasks`, `datasets`), access to a model (`inprocess`,
`http`), and rows for the run's records (`rows`). `leaderboard` makes a board's columns of them.
lm_eval is imported only by calls: this package can be imported without it.
"""
