// Test-only: a driver that takes any function whose driver_override names it, and whose probe fails while the
// parameter `refuse` is an errno.
#include <linux/module.h>
#include <linux/pci.h>
static int refuse;
module_param(refuse, int, 0644);
static int moody_probe(struct pci_dev *d, const struct pci_device_id *id) { return -refuse; }
static struct pci_driver moody = { .name = "moody", .probe = moody_probe };
module_pci_driver(moody);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("test-only driver with moods");
