"""Write what is on record as one page: `python -m tuning.report --help`.

`inputs` reads the records, `kernels` and `pipeline` choose what is shown of them, `charts` draws, and `page` lays it
out twice: as a self-contained HTML page and as Markdown. It adds nothing to the records but ratios and sums.
"""
