"""The rows as a user of the library spells them."""

from ssam_experiments.results.rows import SGD

SPELLINGS = {
    SGD: "the optimizer alone",
    "SAM": "`ssam({rho})`",
    "F-SAM": "`ssam({rho}, direction=directions.friendly())`",
    "VaSSO": "`ssam({rho}, direction=optax.ema(0.6, debias=False))`",
    "GSAM": "`ssam({rho}, combine=combine.gsam(0.4))`",
    "WSAM": "`ssam({rho}, combine=combine.weighted(1.5))`",
    "ASAM": "`ssam({rho}, adaptive=True)`",
    "2-step SAM": "`ssam({rho}, ascent_steps=2)`",
    "quarter batch": "`ssam({rho})`, on a quarter of the batch",
    "eighth batch": "`ssam({rho})`, on an eighth of the batch",
    "SSAM-F 50%": "`ssam({rho}, fisher_mask(Unstructured(0.5), ...))`",
    "SSAM-D 50%": "`ssam({rho}, dynamic_mask(Unstructured(0.5), ...))`",
    "last block": '`ssam({rho}, fixed_mask(...), normalize="masked")` on the last block, two-pass gradients',
    "norm layers": '`ssam({rho}, fixed_mask(...), normalize="masked")` on norm layers, two-pass gradients',
    "every 5th step": "`ssam(radii.every(5, {rho}))`",
    "every 20th step": "`ssam(radii.every(20, {rho}))`",
    "every 4th step": "`ssam(radii.every(4, {rho}))`",
    "every 10th step": "`ssam(radii.every(10, {rho}))`",
    "every 5th, eighth batch": "`ssam(radii.every(5, {rho}))`, on an eighth of the batch",
    "every 20th, half batch": "`ssam(radii.every(20, {rho}))`, on half of the batch",
    "every 10th, quarter batch": "`ssam(radii.every(10, {rho}))`, on a quarter of the batch",
    "every 4th, quarter batch": "`ssam(radii.every(4, {rho}))`, on a quarter of the batch",
    "LookSAM 5": "`ssam(radii.every(5, {rho}), combine=combine.looksam(0.7), skip_zero_rho=True)`",
    "LookSAM 10": "`ssam(radii.every(10, {rho}), combine=combine.looksam(0.7), skip_zero_rho=True)`",
    "SS-SAM 50%": "`ssam(radii.bernoulli(0.5, {rho}))`",
    "last third": "`ssam(radii.every(1, {rho}, start=steps // 3 * 2))`",
    "carried": "`carried(optimizer, {rho})`",
    "carried, norm layers": '`carried(optimizer, {rho}, fixed_mask(...), normalize="masked")` on norm layers',
    "MSAM": "`carried(optimizer, {rho}, direction=against)`, against the momentum",
    "carried momentum": "`carried(optimizer, {rho}, direction=directions.base_momentum())`",
    "carried, SSAM-F 50%": "`carried(optimizer, {rho}, fisher_mask(Unstructured(0.5), ...))`",
    "carried, SSAM-D 50%": "`carried(optimizer, {rho}, dynamic_mask(Unstructured(0.5), ...))`",
    "carried, SAM in the last third": "`carried(optimizer, {rho})`, then `ssam({rho})` in the last third",
    "carried, ASAM, norm layers": (
        '`carried(optimizer, {rho}, fixed_mask(...), normalize="masked", adaptive=True)` on norm layers'
    ),
    "carried F-SAM, norm layers": (
        '`carried(optimizer, {rho}, fixed_mask(...), normalize="masked", direction=directions.friendly())`'
        " on norm layers"
    ),
}
"""By the name of the row; a row that is not here is named alone."""


def spelling(name: str, rho: float | None) -> str:
    """Return how a row is spelled at a radius."""
    text = SPELLINGS.get(name, name)
    return text if rho is None else text.replace("{rho}", f"{rho:g}")
