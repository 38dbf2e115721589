"""Whether a layout did to the bytes what it is there for: an option accepted and ignored trains just as well."""

from tests.composition.axes import Combination
from tests.composition.compare import Trained

SMALL = 32768
"""Bytes that every rank may hold beside its share: what does not grow with the model, such as COSMOS' r x r products
of 14 matrices, and rotary frequencies."""


def ignored(combination: Combination, found: Trained, reference: Trained) -> list[str]:
    """Say which options had no effect on what ranks held."""
    alone = reference.reports[0]
    between = [report.between for report in found.reports]
    said = []
    if combination.resume == "to_one":
        return []  # what is left is the report of one process
    sharded = combination["zero"] != "0" and combination.ranks > 1
    groups = int(combination["replicas"]) if sharded else combination.ranks
    for kind in ("weights", "states"):
        whole, held = alone.between[kind], [each[kind] for each in between]
        if kind == "states" and combination["offload"] != "none":
            if max(held):
                said.append(f"offload={combination['offload']}: {max(held)} bytes of states on a rank's device")
            continue
        if combination["engine"] == "deepspeed":  # keeps weights to compute with beside those it steps, its masters
            if kind == "weights":
                continue
            whole += alone.between["weights"]
        cut = sharded and (kind == "states" or combination["zero"] in ("2", "3"))
        spare = SMALL if combination["engine"] == "deepspeed" else 0  # whose masters are those of parameters alone
        if not cut and abs(max(held) - whole) > spare:
            said.append(f"{kind}: {max(held)} bytes on a rank, one process holds {whole}")
        if cut and not whole <= sum(held) / groups + SMALL:
            said.append(f"{kind}: {sum(held)} bytes on all ranks are less than the {groups} x {whole} to be held")
        if cut and sum(held) / groups > whole * 1.01 + SMALL * len(held):
            said.append(f"{kind}: {sum(held)} bytes on all ranks, parallel.zero={combination['zero']} cuts {whole}")
    whole_weights = combination["zero"] in ("0", "1")  # gathered ones are saved for backward too
    if whole_weights and combination.reference["activations"] != combination["activations"]:
        rows, rows_alone = combination.micro_batch, combination.reference.micro_batch
        # Weights cast to bf16 are saved for backward too, and are as large for few rows as for many.
        casts = alone.between["weights"] // 2 if combination["precision"] in ("bf16", "fp8") else 0
        most = (max(report.peak["activations"] for report in found.reports) - casts) / rows
        if most >= (alone.peak["activations"] - casts) / rows_alone:
            said.append(f"activations={combination['activations']}: {most:.0f} bytes a row, no fewer than with keep")
    return said
