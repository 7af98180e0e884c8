// What one tenant holds in the driver: an object tree with bytes, kept by watching the calls that make and free objects.
// Pure. The sum of device memory here equals what NVML reports for the tenant's processes (H100: to the MiB), so a cap
// on this sum is a cap on the real thing.
#pragma once
