"""Compiles a run's programs in parallel before its first step.

Otherwise each would be compiled at its first call, one after the other; those for a shorter last micro batch in the
middle of the run. XLA uses one or two cores for most of a compilation, so a machine with many cores compiles all in the
time of the longest.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jsft.step.components import Components, arguments
from jsft.step.histograms import Histograms
from jsft.step.programs import StepPrograms


def precompile(
    jitted: StepPrograms,
    histograms: Histograms,
    components: Components,
    evaluates: bool,
    say: Callable[[str], None],
    gradients: Any = None,
) -> tuple[StepPrograms, Histograms]:
    """`jitted` and `histograms` with their programs compiled.

    The step is compiled for the row lengths in a sample of the run's steps, the histograms if the run makes any, and
    the held-out loss if it `evaluates`. Another length is compiled when it occurs. All processes of a run compile the
    same programs at the same time, as XLA requires.

    gradients: `compile_gradients` of these components, where it is there already. It is neither traced nor compiled
    again: not even a program from the compilation cache is free, tracing unrolled layers takes seconds.
    """
    began = time.perf_counter()
    shapes, lengths = arguments(components, jitted), components.data.row_lengths
    lowered = {"update": jitted.update.lower(*shapes["update"])}
    for name in ("gather", "reduce"):
        if program := getattr(jitted, name):
            lowered[name] = program.lower(*shapes[name])
    ready = {} if gradients is None else {components.config.data.pack_length: gradients}
    for length in lengths:
        if length not in ready:
            lowered[length] = jitted.add_gradients.lower(*arguments(components, jitted, length)["add_gradients"])
    if evaluates:
        lowered["evaluate"] = jitted.evaluate.lower(*shapes["evaluate"])
    if 0 < components.config.log.histograms_every <= components.data.total_steps:
        lowered["histograms"] = histograms.lower(*shapes["histograms"])
    # One thread a program: processes that share autotuning results wait for each other, in any order.
    with ThreadPoolExecutor(len(lowered)) as pool:
        compiled = ready | dict(zip(lowered, pool.map(lambda program: program.compile(), lowered.values())))

    def add_gradients(weights, batch, gradients, sums):
        add = compiled.get(batch.tokens.shape[1], jitted.add_gradients)
        return add(weights, batch, gradients, sums)

    more = ", besides the one compiled to choose" if ready else ""
    say(
        f"compiled:  {len(lowered)} programs in {time.perf_counter() - began:.0f} s{more} (rows of "
        f"{', '.join(map(str, lengths))} tokens)"
    )
    evaluate = compiled.get("evaluate", jitted.evaluate)
    programs = jitted._replace(
        gather=compiled.get("gather"),
        add_gradients=add_gradients,
        reduce=compiled.get("reduce"),
        update=compiled["update"],
        evaluate=evaluate,
    )
    return programs, compiled.get("histograms", histograms)
