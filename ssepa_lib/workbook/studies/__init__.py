"""The numbers that the notebooks are about, a module for each question.

Run folders, networks and datasets come in; tables go out, mostly data frames, which `workbook.figures` draws.
`data_study` looks at labels before anything is trained, `step_study` at one training step, `map_study` at
maps image by image, `attention_study` at heads, `haaf_study` at HAAF's objectives, `fsr_study` at FSR's
ablations, `ablation_study` at differences between methods and their noise, `memory_study` at products in
blocks of rows, and `readings` at one network whose maps are read in several ways.
"""
