"""Scores published in the paper 'Rethinking Generalization in Reasoning SFT' (Appendix D, Tables 18, 19, 21, 22, 24).

Percent; MATH500 is avg@3, AIME24 avg@10. Step 0 is the base model. Taken from a transcription of the tables: which
table belongs to which run is inferred. AIME24 has 30 problems and the runs have one seed: a few points are noise.
"""

_STEPS = (10, 20, 40, 80, 160, 320, 480, 640)


def _curves(base: tuple[float, float], math500: list, aime24: list) -> dict[str, dict[int, float]]:
    rows = {"math500": (base[0], math500), "aime24": (base[1], aime24)}
    return {
        task: {0: start, **{n: v for n, v in zip(_STEPS, values, strict=True) if v is not None}}
        for task, (start, values) in rows.items()
    }


# (config name, published name) -> task -> step -> percent
_PUBLISHED = {
    ("qwen3_1_7b-math_cot_ep8", "Qwen3-1.7B_Math-CoT-20k_lr5e-5_ep8_bs256"): _curves(
        (58.9, 5.7),
        [55.7, 53.5, 42.9, 49.6, 51.6, 56.5, 59.1, 56.2],
        [4.3, 3.3, 1.7, 2.7, 4.0, 5.0, 3.7, 5.0],
    ),
    ("qwen3_1_7b-math_nocot_ep8", "Qwen3-1.7B_Math-NoCoT-20k_lr5e-5_ep8_bs256"): _curves(
        (58.9, 5.7),
        [55.2, None, 58.9, 58.1, 58.0, 60.7, 61.3, 59.5],
        [3.0, None, 5.7, 4.7, 4.3, 4.0, 5.7, 5.7],
    ),
    ("qwen3_4b-math_cot_ep8", "Qwen3-4B_Math-CoT-20k_lr5e-5_ep8_bs256"): _curves(
        (70.8, 11.0),
        [64.9, 62.9, 71.5, 77.1, 78.8, 86.3, 87.1, 86.2],
        [9.0, 13.0, 15.3, 19.0, 22.3, 29.0, 27.3, 30.7],
    ),
    ("qwen3_4b-math_nocot_ep8", "Qwen3-4B_Math-NoCoT-20k_lr5e-5_ep8_bs256"): _curves(
        (70.8, 11.0),
        [66.7, None, 73.2, 72.9, 74.3, 75.9, 74.5, 74.3],
        [7.7, None, 10.0, 9.7, 9.0, 11.3, 11.3, 11.7],
    ),
}


def known_scores(name: str) -> dict[str, dict[int, float]]:
    """Published scores of a run, by config's or published name: task -> step -> percent; or {}."""
    for names, scores in _PUBLISHED.items():
        if name in names:
            return scores
    return {}
