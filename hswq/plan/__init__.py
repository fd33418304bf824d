"""Which layers stay 16-bit, as plain data."""

from hswq.plan.activations import static_input_scale
from hswq.plan.make import keep_preset, make_plan, plan_options
from hswq.plan.plan import LayerPlan, Plan
from hswq.plan.select import Candidate, select_layers

__all__ = [
    "Candidate",
    "LayerPlan",
    "Plan",
    "keep_preset",
    "make_plan",
    "plan_options",
    "select_layers",
    "static_input_scale",
]
