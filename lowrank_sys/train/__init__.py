"""`lowrank train`: pre-train a LLaMA with a low-rank optimizer, on `transformers.Trainer`.

The data walks through the files in this order: `data` (text to tokens), `models`, `methods` (an optimizer),
`trainer` (the loop), `record` (metrics.jsonl, the progress line), `checkpoint`, `report` (summary.json, loss.png).
`command` reads the flags and ties them together. Nothing heavy is imported before `command.run`.
"""
