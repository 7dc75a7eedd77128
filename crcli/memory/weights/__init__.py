"""Bytes of a tree's memory that are found in files of weights, so that they need not be stored.

`files` reads them, `views` says how bytes of a file may stand in memory (as they are, or cast), `layout`
where tensors lie in the usual formats, `samples` finds places by value, `match` covers memory with proven
references.
"""
