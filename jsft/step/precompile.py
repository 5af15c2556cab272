"""Compiles a run's programs before its first step, side by side.

Left to their first calls they would be compiled one after the other, those for a shorter last micro batch in the middle
of the run. XLA uses one or two cores for most of a compilation, so a machine with many cores does all in the time of
the longest.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from jsft.step.components import Components, arguments
from jsft.step.histograms import Histograms
from jsft.step.programs import StepPrograms


def compile_ahead(
    jitted: StepPrograms, histograms: Histograms, parts: Components, evaluates: bool, say: Callable[[str], None]
) -> tuple[StepPrograms, Histograms]:
    """Both with their programs compiled: a step's for the lengths of packed row seen in a sample of the run's steps, the
    histograms if the run makes any, and if it `evaluates` the held-out loss's.

    A length that shows up later is compiled then. All processes of a run compile the same programs at the same time, as
    XLA expects of them.
    """
    began = time.perf_counter()
    whole, lengths = arguments(parts, jitted), parts.data.row_lengths
    lowered = {"update": jitted.update.lower(*whole["update"])}
    for name in ("gather", "reduce"):
        if program := getattr(jitted, name):
            lowered[name] = program.lower(*whole[name])
    for length in lengths:
        lowered[length] = jitted.add_gradients.lower(*arguments(parts, jitted, length)["add_gradients"])
    if evaluates:
        lowered["evaluate"] = jitted.evaluate.lower(*whole["evaluate"])
    if 0 < parts.config.log.histograms_every <= parts.data.total_steps:
        lowered["histograms"] = histograms.lower(*whole["histograms"])
    # As many threads as programs: processes that share their autotuning wait for each other's, in any order.
    with ThreadPoolExecutor(len(lowered)) as pool:
        compiled = dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values())))

    def add_gradients(weights, batch, gradients, sums):
        add = compiled.get(batch.tokens.shape[1], jitted.add_gradients)
        return add(weights, batch, gradients, sums)

    say(
        f"compiled:  {len(lowered)} programs in {time.perf_counter() - began:.0f} s (rows of "
        f"{', '.join(map(str, lengths))} tokens)"
    )
    evaluate = compiled.get("evaluate", jitted.evaluate)
    ahead = jitted._replace(
        gather=compiled.get("gather"),
        add_gradients=add_gradients,
        reduce=compiled.get("reduce"),
        update=compiled["update"],
        evaluate=evaluate,
    )
    return ahead, compiled.get("histograms", histograms)
