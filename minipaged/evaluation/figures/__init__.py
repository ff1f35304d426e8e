"""The figures of the paper's evaluation, and some of what came after it, by name."""

from minipaged.evaluation.figures.beyond import (
    components_plot,
    components_table,
    components_tasks,
    policies_plot,
    policies_table,
    policies_tasks,
    pressure_plot,
    pressure_table,
    pressure_tasks,
)
from minipaged.evaluation.figures.common import Figure, bars_of
from minipaged.evaluation.figures.memory import (
    fig2_plot,
    fig2_table,
    fig2_tasks,
    fig13_table,
    fig13_tasks,
    fig18_plot,
    fig18_table,
    fig18_tasks,
    fig19_plot,
    fig19_table,
    fig19_tasks,
)
from minipaged.evaluation.figures.throughput import (
    fig12_plot,
    fig12_table,
    fig12_tasks,
    fig14_table,
    fig14_tasks,
    fig15_table,
    fig15_tasks,
    fig16_table,
    fig16_tasks,
    fig17_plot,
    fig17_table,
    fig17_tasks,
)

RATE = "times the rate of requests"
FIGURES = {
    "fig2": Figure("What the memory of the KV cache holds", fig2_tasks, fig2_table, fig2_plot),
    "fig12": Figure("Latency over the rate of requests", fig12_tasks, fig12_table, fig12_plot),
    "fig13": Figure(
        "Requests that run at a time",
        fig13_tasks,
        fig13_table,
        bars_of(fig13_table, "mean number of running requests"),
    ),
    "fig14": Figure(
        "Parallel sampling and beam search", fig14_tasks, fig14_table, bars_of(fig14_table, RATE)
    ),
    "fig15": Figure(
        "Memory saved by sharing",
        fig15_tasks,
        fig15_table,
        bars_of(fig15_table, "% of the blocks"),
        note="Measured with the engine and the shipped model, not simulated.",
    ),
    "fig16": Figure("A shared prefix", fig16_tasks, fig16_table, bars_of(fig16_table, RATE)),
    "fig17": Figure("A chat", fig17_tasks, fig17_table, fig17_plot),
    "fig18": Figure(
        "What paging costs, and the size of a block",
        fig18_tasks,
        fig18_table,
        fig18_plot,
        note="The attention is measured on the machine that runs this; the paper's is that of an "
        "A100.  The sizes of blocks show waste and sharing alone: that a GPU reads very small "
        "blocks more slowly is not in the cost model.",
    ),
    "fig19": Figure("Recomputation and swapping", fig19_tasks, fig19_table, fig19_plot),
    "policies": Figure(
        "Short requests first",
        policies_tasks,
        policies_table,
        policies_plot,
        note="Ours beside first come, first served; the paper has that alone. The output's length "
        "is taken to be known.",
    ),
    "pressure": Figure(
        "A cache that is too small",
        pressure_tasks,
        pressure_table,
        pressure_plot,
        note="Output tokens per second; 128 requests of 512 + 512 tokens, all there at once.",
    ),
    "components": Figure(
        "What the memory of the GPU holds",
        components_tasks,
        components_table,
        components_plot,
        note="OPT-13B on an A100-40GB; weights and cache as in table 1, the rest is activations "
        "and what the framework takes.",
    ),
}
