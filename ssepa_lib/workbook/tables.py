"""Result tables: runs collected from disk, mean and spread over seeds, and the published numbers beside them."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ssepa_lib.errors import UserError
from ssepa_lib.evaluation.evaluate import INFERENCE, describe_inference, product_names, read_metrics

METHODS = {
    "toco": "ToCo",
    "ssepa_no_affinity": "SS-EPA (w/o Patch Affinity)",
    "ssepa_affinity": "SS-EPA (with Patch Affinity)",
    "ssepa": "SS-EPA (with Patch Affinity, HAAF)",
    "ssepa_fast": "SS-EPA (HAAF once per image)",
    "fsr": "FSR",
    "ssepa_fsr": "SS-EPA + FSR",
}
OURS = "this workbook"
SEGMENTATION, PSEUDO_LABEL = (
    product_names([name], tuple(INFERENCE)) for name in ("segmentation", "pseudo_label")
)
STRATEGIES = {
    "none": "SS-EPA (w/o Patch Affinity)",
    "all_heads": "SS-EPA (with Patch Affinity)",
    "haaf_dense": "SS-EPA (with Patch Affinity, HAAF)",
    "haaf_fused": "SS-EPA (with Patch Affinity, HAAF), fused",
}


def collect_runs(folder: Path | str) -> pd.DataFrame:
    """Every evaluated run below a folder, one row per run and split: the result on the most images.

    Columns: `run`, `preset` (folder names), the entries of the setting (`data`, `split`, `method`, `seed`, `steps`, …),
    `variant` (what the run's name adds to the method), one column of mIoU in percent per product,
    `mean_average_precision`, and `settings`, the whole setting as a dict.

    Raises:
        UserError: a metrics file that is not JSON or has another layout.
    """
    rows = []
    for path in sorted(Path(folder).rglob("metrics.json")):
        run, results = path.parent.name, read_metrics(path.parent).values()
        most = {
            result["setting"]["split"]: result
            for result in sorted(results, key=lambda r: r["setting"]["images"])
        }
        for result in most.values():
            setting = result["setting"]
            plain = {name: value for name, value in setting.items() if name != "products"}
            variant = run.removesuffix(f"-seed{setting['seed']}").removeprefix(setting["method"]).strip("-")
            row = {"run": run, "preset": path.parent.parent.name, "variant": variant, **plain}
            row |= result["miou"] | {"mean_average_precision": result["mean_average_precision"]}
            rows.append(row | {"settings": setting})
    return pd.DataFrame(rows)


def _by_seed(runs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    twice = runs.duplicated([*by, "seed"])
    if twice.any():
        first = runs[twice].iloc[0]
        where = ", ".join(f"{name} {first[name]}" for name in [*by, "seed"])
        raise UserError(f"several runs share {where}; filter by split or add a column to the grouping.")
    return runs


def summary(runs: pd.DataFrame, by: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Mean and sample standard deviation over seeds.

    Returns:
        The columns `by`, `seeds`, and per metric `<metric>` and `<metric>_sd` (NaN with a single seed).

    Raises:
        UserError: a seed appears twice in a group, so that different things would be averaged.
    """
    groups = _by_seed(runs, by).groupby(list(by), sort=False, dropna=False)
    table = groups["seed"].nunique().rename("seeds").to_frame()
    for metric in metrics:
        values = groups[metric]
        table[metric] = values.agg(lambda x: x.astype(float).mean())
        table[f"{metric}_sd"] = values.agg(lambda x: x.astype(float).std())
    return table.reset_index()


def paired_differences(runs: pd.DataFrame, by: str, base: str, metrics: Sequence[str]) -> pd.DataFrame:
    """Difference from a base row, seed by seed over the seeds both have: the spread between seeds cancels.

    Returns:
        `by`, `seeds` (common ones), and per metric `<metric>` (mean difference) and `<metric>_sd`.

    Raises:
        UserError: no run is the base row; a seed appears twice.
    """
    runs = _by_seed(runs, [by]).set_index("seed")
    if base not in set(runs[by]):
        raise UserError(
            f"no run has {by} '{base}'; choose one of {', '.join(sorted(map(str, set(runs[by]))))}."
        )
    reference = runs.loc[runs[by] == base, list(metrics)].astype(float)
    rows = []
    for name in runs[by].unique():
        difference = runs.loc[runs[by] == name, list(metrics)].astype(float) - reference
        difference = difference.loc[runs.index[runs[by] == name].intersection(reference.index)]
        row = {by: name, "seeds": len(difference)}
        for metric in metrics:
            row |= {metric: difference[metric].mean(), f"{metric}_sd": difference[metric].std()}
        rows.append(row)
    return pd.DataFrame(rows)


def plus_minus(mean: float, sd: float = float("nan"), digits: int = 1) -> str:
    """`72.4 ± 0.3`; without the spread when it is unknown, `–` when there is no number."""
    if pd.isna(mean):
        return "–"
    return f"{mean:.{digits}f}" + ("" if pd.isna(sd) else f" ± {sd:.{digits}f}")


def to_markdown(table: pd.DataFrame, digits: int = 1) -> str:
    """A table as GitHub Markdown: columns padded, numbers to the right, `–` for what is missing."""

    def cell(value) -> str:
        if value is None or (isinstance(value, float) and pd.isna(value)):
            return "–"
        text = f"{value:.{digits}f}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    columns = []
    for name in table.columns:
        cells = [cell(value) for value in table[name]]
        right = bool(cells) and all(c[:1].isdigit() or c[:1] in "–-+−" for c in cells)
        width = max(len(text) for text in [cell(name), *cells, "---"])
        rule = "-" * (width - 1) + (":" if right else "-")
        columns.append(
            [f"{text:{'>' if right else '<'}{width}}" for text in [cell(name)]]
            + [rule]
            + [f"{text:{'>' if right else '<'}{width}}" for text in cells]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in zip(*columns, strict=True))


# Published numbers, mIoU in percent; None where the paper gives none.
_TABLE_1 = [
    ("multi", "ViT-PCM", "ViT-B", 67.7, 66.0),
    ("multi", "MCTformer", "DeiT-S", 69.1, None),
    ("multi", "LPCAM", "DeiT-S", None, 70.8),
    ("multi", "SFC", "ResNet101", 73.7, None),
    ("multi", "POLE", "ResNet50", 74.2, None),
    ("single", "RRM", "ResNet38", None, 65.4),
    ("single", "1Stage", "ResNet38", 66.9, 65.3),
    ("single", "SLRNet", "ResNet38", 67.1, 66.2),
    ("single", "AFA", "MiT-B1", 68.7, 66.5),
    ("single", "MCC", "DeiT-B", 75.1, 72.2),
    ("single", "ToCo", "ViT-B", 74.5, 72.2),
    ("single", "ToCo+MS+CRF", "ViT-B", 77.3, 74.6),
    ("single", "SS-EPA", "ViT-B", 77.1, 74.2),
]
_TABLE_2 = [
    ("multi", "ReCAM", "ResNet101", 68.5, 68.4),
    ("multi", "ViT-PCM", "ResNet101", 70.3, 70.9),
    ("multi", "CLIMS", "ResNet101", 70.4, 70.0),
    ("multi", "AMN", "ResNet101", 70.7, 70.6),
    ("multi", "EDAM", "ResNet101", 70.9, 70.6),
    ("multi", "SFC", "ResNet101", 71.2, 72.5),
    ("multi", "POLE", "ResNet50", 71.5, 71.4),
    ("multi", "MCTformer", "DeiT-S", 71.9, 71.6),
    ("multi", "L2G", "ResNet101", 72.1, 71.7),
    ("multi", "BECO", "ResNet101", 72.1, 71.8),
    ("multi", "RCA", "ResNet38", 72.2, 72.8),
    ("multi", "LPCAM", "DeiT-S", 72.6, 72.4),
    ("multi", "OCR", "ResNet38", 72.7, 72.0),
    ("single", "RRM", "ResNet38", 62.6, 62.9),
    ("single", "1Stage", "ResNet38", 62.7, 64.3),
    ("single", "AFA", "MiT-B1", 66.0, 66.3),
    ("single", "SLRNet", "ResNet38", 67.2, 67.6),
    ("single", "MCC", "DeiT-B", 70.3, 71.2),
    ("single", "ToCo", "ViT-B", 71.1, 72.2),
    ("single", "SS-EPA", "ViT-B", 72.4, 73.2),
]
_TABLE_3 = [
    ("ToCo", 77.3, 71.1, 72.2),
    ("SS-EPA (w/o Patch Affinity)", 76.2, 71.3, 71.6),
    ("SS-EPA (with Patch Affinity)", 79.0, 71.9, 72.7),
    ("SS-EPA (with Patch Affinity, HAAF)", 79.5, 72.4, 73.3),
]
_TABLE_4 = [
    ("SS-EPA (w/o Patch Affinity)", "ViT-B", 6.6, 10.4),
    ("SS-EPA (with Patch Affinity)", "ViT-B", 13.2, 23.6),
    ("SS-EPA (with Patch Affinity, HAAF)", "ViT-B", 8.3, 12.6),
]
_TABLE_5 = [
    ("ToCo", "vit-small-patch16-224", 8, 224, 55.0, 52.7),
    ("SS-EPA", "vit-small-patch16-224", 8, 224, 57.6, 50.2),
    ("ToCo", "vit-base-patch16-384", 12, 384, 71.1, 71.8),
    ("SS-EPA", "vit-base-patch16-384", 12, 384, 71.7, 71.9),
    ("ToCo", "vit-base-patch16-224", 12, 224, 71.1, 72.2),
    ("SS-EPA", "vit-base-patch16-224", 12, 224, 72.4, 73.3),
]
NOTES = {
    1: "The text says SS-EPA beats ToCo with and without MS and CRF; the table has SS-EPA (77.1 / 74.2) below"
    " ToCo+MS+CRF (77.3 / 74.6). Table 3 gives 79.5 on train for what seems to be the same row with MS and CRF. RRM is"
    " cited as [21] here and as [30], which is 1Stage, in Table 2.",
    2: "The header of the paper's table says train and val; text and values say val and test, as written here. SS-EPA"
    " on test is 73.2 here and 73.3 in the abstract, the text, Table 3 and Table 5.",
    3: "ToCo's pseudo-label 77.3 is its MS+CRF row of Table 1. The last digit of the four printed test values (72.21,"
    " 71.62, 72.73, 73.34) counts 1 to 4 and reads as a footnote mark; without it they equal the text and Table 5.",
    4: "GB of a whole training step, device not stated; row 2 keeps every head, row 3 the head means.",
    5: "Img_size is the checkpoint's pre-training size, not the crop (448). The text says SS-EPA is better with every"
    " backbone on val and test; with vit-small its test value (50.2) is below ToCo's (52.7).",
}  # what does not fit together in the paper, by table


def _published(rows: Sequence[tuple], columns: Sequence[str], numbers: int, digits: int = 1) -> pd.DataFrame:
    """Published rows with their last `numbers` columns as text."""
    table = pd.DataFrame(rows, columns=list(columns))
    for column in columns[-numbers:]:
        table[column] = [plus_minus(value, digits=digits) for value in table[column].astype(float)]
    return table.assign(source="published", setting="as the paper reports")


def _label(row: pd.Series) -> str:
    name = METHODS.get(row["method"], row["method"])
    return f"{name}, {row['variant']}" if row["variant"] else name


def _cell(runs: pd.DataFrame, split: str, product: str) -> tuple[str, dict, str, int] | None:
    """Number, setting, inference and seeds of one product on one split; None where no run has it.

    Runs on fewer images than another are left out: a mean over seeds is over the same images.
    """
    if product not in runs:
        return None
    runs = runs[(runs["split"] == split) & runs[product].notna()]
    if runs.empty:
        return None
    runs = runs[runs["images"] == runs["images"].max()]
    mean = summary(runs, ["method"], [product]).iloc[0]
    text = plus_minus(mean[product], mean[f"{product}_sd"])
    setting = runs.iloc[0]["settings"]
    return text, setting, describe_inference(setting["products"][product]), int(mean["seeds"])


def _ours(runs: pd.DataFrame | None, columns: dict[str, tuple[str, Sequence[str]]]) -> pd.DataFrame:
    """Our rows, one per preset, method, backbone and way of inference.

    Args:
        columns: name of the table's column → (split, products); the i-th products of all columns make the i-th row, a
            single product stands in each.
    """
    if runs is None or runs.empty:
        return pd.DataFrame()
    key, rows = ["preset", "method", "variant", "backbone", "steps"], []
    for values, group in runs.groupby(key, sort=False):
        for way in range(max(len(products) for _, products in columns.values())):
            cells = {
                name: _cell(group, split, products[way if len(products) > 1 else 0])
                for name, (split, products) in columns.items()
            }
            if not any(
                cells[name] for name, (_, products) in columns.items() if way == 0 or len(products) > 1
            ):
                continue
            row = dict(zip(key, values, strict=True)) | {
                name: cell[0] if cell else "–" for name, cell in cells.items()
            }
            setting = _setting({name: cell for name, cell in cells.items() if cell})
            rows.append(row | {"source": f"{OURS} ({row['preset']})", "setting": setting})
    return pd.DataFrame(rows)


def _setting(cells: dict[str, tuple[str, dict, str, int]]) -> str:
    """What the cells of a row have in common, said once: `scale 1; 224²; val 500 images; 1000 steps of 8; 3 seeds`."""
    ways = {name: inference for name, (_, _, inference, _) in cells.items()}
    alike = len(set(ways.values())) == 1
    parts = (
        [next(iter(ways.values()))] if alike else [f"{name} {inference}" for name, inference in ways.items()]
    )
    for _, s, _, _ in cells.values():
        parts += [f"{s['size']}²" if s["size"] else "original size", f"{s['split']} {s['images']} images"]
    for _, s, _, seeds in cells.values():
        parts += [f"{s['steps']} steps of {s['batch']}", f"{seeds} seed" + "s" * (seeds > 1)]
    return "; ".join(dict.fromkeys(parts))


def _beside(published: pd.DataFrame, ours: pd.DataFrame) -> pd.DataFrame:
    """Published rows, then ours, in the columns of the published table."""
    if ours.empty:
        return published
    ours = ours.assign(method=[_label(row) for _, row in ours.iterrows()])
    both = pd.concat([published.astype(object), ours.reindex(columns=published.columns)], ignore_index=True)
    return both.where(both.notna(), "–")


def table_1(runs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Pseudo-labels on VOC train and val (SS-EPA, Table 1) beside runs from `collect_runs`."""
    published = _published(_TABLE_1, ["stages", "method", "backbone", "train", "val"], 2)
    ours = _ours(runs, {"train": ("train", PSEUDO_LABEL), "val": ("val", PSEUDO_LABEL)})
    return _beside(published, ours.assign(stages="single"))


def table_2(runs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Segmentation on VOC val and test (SS-EPA, Table 2); raw, MS and MS+CRF are rows of their own.

    Only the VOC server scores the test split, so that column of ours stays empty here and in the tables below.
    """
    published = _published(_TABLE_2, ["stages", "method", "backbone", "val", "test"], 2)
    ours = _ours(runs, {"val": ("val", SEGMENTATION)})
    return _beside(published, ours.assign(stages="single"))


def table_3(runs: pd.DataFrame | None = None) -> pd.DataFrame:
    """The ablation of patch affinity and HAAF (SS-EPA, Table 3), each published row above ours."""
    columns = ["method", "pseudo-label (train)", "seg (val)", "seg (test)"]
    published = _published(_TABLE_3, columns, 3)
    wanted = {columns[1]: ("train", PSEUDO_LABEL), columns[2]: ("val", SEGMENTATION)}
    if runs is not None and not runs.empty:
        runs = runs[runs["method"].isin(["toco", "ssepa_no_affinity", "ssepa_affinity", "ssepa"])]
    table = _beside(published, _ours(runs, wanted))
    order = {row[0]: i for i, row in enumerate(_TABLE_3)}
    rank = table["method"].map(lambda name: next(i for label, i in order.items() if name.startswith(label)))
    return table.loc[rank.sort_values(kind="stable").index].reset_index(drop=True)


def table_4(measured: pd.DataFrame | None = None) -> pd.DataFrame:
    """Memory of a training step in GB at batch 1 and 2 (SS-EPA, Table 4) beside our measurement.

    Args:
        measured: columns `strategy` (none, all_heads, haaf_dense, haaf_fused), `batch`, `gigabytes`, `backbone`,
            `setting` (device, crop, precision).
    """
    published = _published(_TABLE_4, ["method", "backbone", "batch 1", "batch 2"], 2)
    if measured is None or measured.empty:
        return published
    wide = measured.pivot_table(
        index=["strategy", "backbone", "setting"], columns="batch", values="gigabytes"
    )
    rows = [
        {"method": STRATEGIES[strategy], "backbone": backbone, "source": OURS, "setting": setting}
        | {f"batch {b}": plus_minus(values.get(b, float("nan"))) for b in (1, 2)}
        for (strategy, backbone, setting), values in wide.iterrows()
    ]
    order = list(STRATEGIES.values())
    rows.sort(key=lambda row: order.index(row["method"]))
    return pd.concat([published, pd.DataFrame(rows)[published.columns]], ignore_index=True)


def table_5(runs: pd.DataFrame | None = None) -> pd.DataFrame:
    """Backbones (SS-EPA, Table 5)."""
    published = _published(
        _TABLE_5, ["method", "backbone", "depth", "img_size", "seg (val)", "seg (test)"], 2
    )
    return _beside(published, _ours(runs, {"seg (val)": ("val", SEGMENTATION)}))
