"""Figures that the paper published (MagicMirror, ICCV 2025): tables and success rates, made elsewhere.

Other people, other prompts, other seeds, and a detector that may differ: they say where a figure should lie, not who
is ahead.
"""

SOURCE = "published by the authors (arXiv:2501.03931), not measured here"
COLUMNS = ("dynamic_degree", "text", "inception_score", "smoothness", "similarity", "decay", "fm_ref", "fm_inter")
MAIN_TABLE = {
    "DynamiCrafter": (0.455, 0.168, 8.20, 0.507, 0.896, 0.002, 0.237, 0.287),
    "EasyAnimate-I2V": (0.155, 0.177, 9.55, 0.482, 0.903, 0.022, 0.262, 0.278),
    "CogVideoX-I2V": (0.660, 0.213, 9.85, 0.497, 0.901, 0.029, 0.413, 0.532),
    "ID-Animator": (0.140, 0.211, 7.57, 0.515, 0.923, 0.005, 0.652, 0.181),
    "ConsisID": (0.615, 0.236, 11.09, 0.513, 0.913, 0.002, 0.652, 0.601),
    "MagicMirror": (0.705, 0.240, 10.59, 0.484, 0.922, 0.002, 0.730, 0.610),
}
# shares in per cent: motion, text, face recognised, identity
SUCCESS_RATES = {
    "ID-Animator": (11.5, 60.0, 93.5, 82.5),
    "ConsisID": (38.5, 73.5, 89.5, 74.5),
    "MagicMirror": (44.0, 75.5, 98.0, 81.0),
}
# row's letter -> figures
ABLATION_COLUMNS = ("text", "fm_inter", "similarity")
ABLATION = {
    "A": (0.238, 0.572, 0.865),
    "B": (0.240, 0.584, 0.869),
    "C": (0.239, 0.654, 0.870),
    "D": (0.241, 0.563, 0.872),
    "E": (0.242, 0.696, 0.875),
    "F": (0.236, 0.568, 0.886),
    "G": (0.241, 0.559, 0.883),
    "full": (0.240, 0.665, 0.911),
}
# one A800, 49 frames of 480x720: GiB, billions of parameters with T5 and VAE, seconds
COST = {
    "CogVideoX-5B": (24.9, 10.5, 204),
    "CogVideoX-I2V": (25.9, 10.6, 213),
    "ConsisID": (41.5, 11.1, 213),
    "MagicMirror": (28.6, 12.8, 209),
}


def published_rows() -> dict[str, dict[str, float]]:
    """Model -> figure -> value."""
    return {model: dict(zip(COLUMNS, values, strict=True)) for model, values in MAIN_TABLE.items()}


def published_ablation() -> dict[str, dict[str, float]]:
    """Row's letter, or full -> figure -> value."""
    return {row: dict(zip(ABLATION_COLUMNS, values, strict=True)) for row, values in ABLATION.items()}
