"""Which layers matter: what each does to the model's predictions, and what to do about it under a budget."""

from w8a8.analysis.budget import Allocation as Allocation
from w8a8.analysis.budget import Budget as Budget
from w8a8.analysis.budget import allocate as allocate
from w8a8.analysis.errors import layer_errors as layer_errors
from w8a8.analysis.layers import sensitivity as sensitivity
from w8a8.analysis.remedy import remedies as remedies
from w8a8.records.layers import LayerErrors as LayerErrors
from w8a8.records.layers import Remedy as Remedy
from w8a8.records.layers import Sensitivity as Sensitivity
