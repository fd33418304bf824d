"""Which layers stay 16-bit, as plain data."""

from hswq.plan.activations import static_input_scale
from hswq.plan.impact import Part, check_impact, measure_impact
from hswq.plan.make import keep_preset, make_plan, plan_options
from hswq.plan.plan import LayerPlan, Plan
from hswq.plan.select import Candidate, select_layers

__all__ = [
    "Candidate",
    "LayerPlan",
    "Part",
    "Plan",
    "check_impact",
    "keep_preset",
    "make_plan",
    "measure_impact",
    "plan_options",
    "select_layers",
    "static_input_scale",
]
