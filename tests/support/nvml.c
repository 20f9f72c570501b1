/* A driver library with three devices: plain, lost, and one split into MIG instances. */
#include <stdio.h>
#include <string.h>
enum { SUCCESS = 0, NO_PERMISSION = 4, NOT_FOUND = 6, LOST = 15 };
typedef struct { unsigned long long total, free, used; } memory;
int nvmlInitWithFlags(unsigned flags) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "580.1"); return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(long)(index + 1); return SUCCESS; }
int nvmlDeviceGetName(void *device, char *text, unsigned size) { snprintf(text, size, "Device %ld", (long)device - 1); return SUCCESS; }
int nvmlDeviceGetUUID(void *device, char *text, unsigned size) { snprintf(text, size, "GPU-%ld0", (long)device - 1); return SUCCESS; }
int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) { *count = (long)device == 3 ? 4 : 0; return SUCCESS; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **instance) {
  *instance = (void *)(long)(100 + index);
  return index < 2 ? SUCCESS : NOT_FOUND;
}
int nvmlDeviceGetMemoryInfo(void *device, memory *found) {
  long number = (long)device;
  if (number == 2) return LOST;
  if (number == 3) return NO_PERMISSION;
  memory plain = {1000, 900, 100}, instance = {50, 20, 30};
  *found = number == 1 ? plain : instance;
  return SUCCESS;
}
