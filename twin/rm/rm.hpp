// The simulated driver's resource manager and the GPU's scheduler below it.
#pragma once
