"""The benchmark: contenders side by side in the limits of an edge device, with records that say all that is needed to repeat it.

A *row* is one set of limits and lengths (`suite.py`, `profile.py`); a *contender* is one engine with its options (`contender.py`,
`peers.py`); a *run* is one contender in one row, in a process of its own (`worker.py`), started cold (`runner.py`), and leaves one
JSON file (`record.py`). `report.py` and `plots.py` only read those files.
"""
