// Software slices: tenants that share one GPU's time and memory.
#pragma once
