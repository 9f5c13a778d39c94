"""Report: the evidence of one search as frozen data, and its views: an HTML page, a model card, a terminal.

Public names live in the modules, so that the command line can print a table without loading plotly:

- `simmerge.report.data`: `ReportData` and its parts, `to_json`, `from_json`
- `simmerge.report.page`: `render`, `write_report`
- `simmerge.report.card`: `model_card`, `evidence_of`
- `simmerge.report.console`: `RankingTable`, `BaselineTable`, `SpendTable`, `AnswerPanel`
- `simmerge.report.sentences`: `headline`, `comparison`, `saving`: what all three views say in words
- `simmerge.report.text`: how numbers, intervals and durations are written
"""
