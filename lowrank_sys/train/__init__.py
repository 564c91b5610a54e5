"""`lowrank train`: pre-train a LLaMA with a low-rank optimizer, on `transformers.Trainer`.

The data walks through the files in this order: `documents` and `rows` (`--data` to texts), `encoders` (texts to ids), `tokens`
(ids on the disk), `data` (the split, windows), `models`, `methods` (an optimizer), `trainer` (the loop), `record`
(metrics.jsonl, the progress line), `checkpoint`, `report` (summary.json, loss.png).
`command` reads the flags and ties them together. Nothing heavy is imported before `command.run`.
"""
