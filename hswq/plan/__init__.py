"""Which layers stay 16-bit, as plain data."""

from hswq.plan.activations import static_input_scale
from hswq.plan.curve import error_curve, thinned
from hswq.plan.impact import (
    Part,
    check_impact,
    complete_impact,
    impact_options,
    measure_impact,
)
from hswq.plan.make import keep_preset, make_plan, plan_options
from hswq.plan.plan import CurvePoint, LayerPlan, Plan
from hswq.plan.select import Candidate, select_layers

__all__ = [
    "Candidate",
    "CurvePoint",
    "LayerPlan",
    "Part",
    "Plan",
    "check_impact",
    "complete_impact",
    "error_curve",
    "impact_options",
    "keep_preset",
    "make_plan",
    "measure_impact",
    "plan_options",
    "select_layers",
    "static_input_scale",
    "thinned",
]
