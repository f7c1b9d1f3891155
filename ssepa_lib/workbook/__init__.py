"""From numbers to what people look at.

Run folders, results and networks come in; studies over methods and seeds, tables beside the published ones,
figures, executed notebooks and an HTML report go out. The notebooks use `figures`, `diagrams`, `explorers`,
`lesson`, `study` (runs in their places), `studies` (the numbers of one question each), `film` (snapshots of a
run), `own_images` and `upload` (yours), `tables` and `published`; the command line runs them by
`runner.run_workbook`.
"""
