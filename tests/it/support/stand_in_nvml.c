// A stand-in for the driver's library. It says what the file named by STAND_IN_NVML says, looked at again at every call:
//
//   gpus 2
//   0.uuid GPU-a              a value of GPU 0; what is not in the file is not supported
//   0.utilization !4          in place of a value: the error of that number
//   0.all !15                 the same for every call about GPU 0
//   0.hang 1                  every call about GPU 0 waits until the line is gone
//   0.processes 7:1000 8:-    process and its memory; `-`: not available
//   0.samples 7:40            process and its share of the multiprocessors in percent
//   0.xid 1 79                an event: its number, which must rise, and the XID
//   0:1.uuid MIG-a            MIG instance 1 of GPU 0 (with `0.mig 2`: places for instances)
//
// Built with -DOLD it lacks what old drivers lack.

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define GPUS_MAX 16
#define INSTANCES_MAX 8
enum { SUCCESS, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, TIMEOUT = 10 };

typedef struct { unsigned gpu; int instance; } Device;
static Device devices[GPUS_MAX][INSTANCES_MAX + 1];

// How many files were read.
static unsigned version;

// The file's text, read again when another file stands there.
static const char *text(void) {
  static char kept[1 << 16];
  static struct stat known;
  struct stat now;
  const char *path = getenv("STAND_IN_NVML");
  if (!path || stat(path, &now)) return "";
  if (now.st_ino != known.st_ino || now.st_mtim.tv_nsec != known.st_mtim.tv_nsec) {
    FILE *file = fopen(path, "r");
    kept[file ? fread(kept, 1, sizeof kept - 1, file) : 0] = 0;
    if (file) fclose(file);
    known = now;
    version++;
  }
  return kept;
}

// The value of a key; SUCCESS, or the error that stands there.
static int find(const char *key, char *value, size_t size) {
  static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
  size_t length = strlen(key);
  int result = NOT_SUPPORTED;
  pthread_mutex_lock(&one);
  const char *end;
  for (const char *line = text(); *line; line = end ? end + 1 : strchr(line, 0)) {
    end = strchr(line, '\n');
    if (strncmp(line, key, length) != 0 || line[length] != ' ') continue;
    line += length + 1;
    if (*line == '!') result = atoi(line + 1);
    else {
      snprintf(value, size, "%.*s", (int)strcspn(line, "\n"), line);
      result = SUCCESS;
    }
    break;
  }
  pthread_mutex_unlock(&one);
  return result;
}

static int ask(const Device *device, const char *what, char *value, size_t size) {
  char key[64], found[64];
  for (;;) {
    snprintf(key, sizeof key, "%u.hang", device->gpu);
    if (find(key, found, sizeof found) != SUCCESS) break;
    usleep(10000);
  }
  snprintf(key, sizeof key, "%u.all", device->gpu);
  int all = find(key, found, sizeof found);
  if (all != SUCCESS && all != NOT_SUPPORTED) return all;
  if (device->instance < 0) snprintf(key, sizeof key, "%u.%s", device->gpu, what);
  else snprintf(key, sizeof key, "%u:%d.%s", device->gpu, device->instance, what);
  return find(key, value, size);
}

static int number(const Device *device, const char *what, unsigned long long *value) {
  char text[64];
  int result = ask(device, what, text, sizeof text);
  if (result == SUCCESS) *value = strtoull(text, NULL, 0);
  return result;
}

static int small(const Device *device, const char *what, unsigned *value) {
  unsigned long long found = 0;
  int result = number(device, what, &found);
  if (result == SUCCESS) *value = (unsigned)found;
  return result;
}

int nvmlInit_v2(void) { char value[64]; int result = find("init", value, sizeof value); return result == NOT_SUPPORTED ? SUCCESS : result; }
int nvmlShutdown(void) { return SUCCESS; }
int nvmlSystemGetDriverVersion(char *version, unsigned length) { return find("driver", version, length); }

int nvmlDeviceGetCount_v2(unsigned *count) {
  char value[64];
  int result = find("gpus", value, sizeof value);
  *count = result == SUCCESS ? (unsigned)atoi(value) : 0;
  return result;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device) {
  unsigned count;
  int result = nvmlDeviceGetCount_v2(&count);
  if (result != SUCCESS) return result;
  if (index >= count || index >= GPUS_MAX) return INVALID_ARGUMENT;
  *device = &devices[index][INSTANCES_MAX];
  (*device)->gpu = index;
  (*device)->instance = -1;
  return SUCCESS;
}

int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned length) { return ask(device, "uuid", uuid, length); }
int nvmlDeviceGetName(Device *device, char *name, unsigned length) { return ask(device, "name", name, length); }

#ifndef OLD
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory;
int nvmlDeviceGetMemoryInfo_v2(Device *device, Memory *memory) {
  if (memory->version != (sizeof *memory | 2u << 24)) return 25;
  int result = number(device, "memory.total", &memory->total);
  if (result == SUCCESS) result = number(device, "memory.used", &memory->used);
  memory->reserved = 0;
  memory->free = memory->total - memory->used;
  return result;
}
#endif

typedef struct { unsigned gpu, memory; } Utilization;
int nvmlDeviceGetUtilizationRates(Device *device, Utilization *rates) {
  rates->memory = 0;
  return small(device, "utilization", &rates->gpu);
}

int nvmlDeviceGetTemperature(Device *device, int sensor, unsigned *value) { (void)sensor; return small(device, "temperature", value); }
int nvmlDeviceGetTemperatureThreshold(Device *device, int which, unsigned *value) {
  return which == 1 ? small(device, "temperature.slowdown", value) : NOT_SUPPORTED;
}
int nvmlDeviceGetPowerUsage(Device *device, unsigned *value) { return small(device, "power", value); }
int nvmlDeviceGetEnforcedPowerLimit(Device *device, unsigned *value) { return small(device, "power.limit", value); }
int nvmlDeviceGetClockInfo(Device *device, int which, unsigned *value) {
  return which == 1 ? small(device, "clock", value) : NOT_SUPPORTED;
}
int nvmlDeviceGetMaxClockInfo(Device *device, int which, unsigned *value) {
  return which == 1 ? small(device, "clock.max", value) : NOT_SUPPORTED;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(Device *device, unsigned long long *value) { return number(device, "throttle", value); }
int nvmlDeviceGetTotalEccErrors(Device *device, int type, int counter, unsigned long long *value) {
  (void)counter;
  return number(device, type == 0 ? "ecc.corrected" : "ecc.uncorrected", value);
}
int nvmlDeviceGetNvLinkState(Device *device, unsigned link, unsigned *up) {
  unsigned count, active;
  if (small(device, "nvlinks", &count) != SUCCESS || link >= count) return NOT_SUPPORTED;
  int result = small(device, "nvlinks.active", &active);
  *up = link < active;
  return result;
}

typedef struct { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; } ProcessInfo;
int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, ProcessInfo *processes) {
  char text[1024], *rest = text, *word;
  int result = ask(device, "processes", text, sizeof text);
  if (result != SUCCESS) return result;
  unsigned found = 0;
  while ((word = strtok_r(rest, " ", &rest))) {
    if (processes && found < *count) {
      char *memory = strchr(word, ':');
      ProcessInfo process = {(unsigned)atoi(word), ~0ull, ~0u, ~0u};
      if (memory && memory[1] != '-') process.memory = strtoull(memory + 1, NULL, 0);
      processes[found] = process;
    }
    found++;
  }
  int fits = processes && found <= *count;
  *count = found;
  return fits || found == 0 ? SUCCESS : INSUFFICIENT_SIZE;
}

#ifndef OLD
typedef struct { unsigned pid; unsigned long long at; unsigned sm, memory, encoder, decoder; } Sample;
int nvmlDeviceGetProcessUtilization(Device *device, Sample *samples, unsigned *count, unsigned long long since) {
  char text[1024], *rest = text, *word;
  int result = ask(device, "samples", text, sizeof text);
  if (result != SUCCESS) return result;
  unsigned found = 0;
  while ((word = strtok_r(rest, " ", &rest))) {
    char *share = strchr(word, ':');
    if (samples && found < *count) {
      Sample sample = {(unsigned)atoi(word), since + 1, share ? (unsigned)atoi(share + 1) : 0, 0, 0, 0};
      samples[found] = sample;
    }
    found++;
  }
  int fits = samples && found <= *count;
  *count = found;
  return found == 0 ? NOT_FOUND : fits ? SUCCESS : INSUFFICIENT_SIZE;
}

int nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending) {
  unsigned places = 0;
  int result = small(device, "mig", &places);
  *current = *pending = places > 0;
  return result;
}
int nvmlDeviceGetMaxMigDeviceCount(Device *device, unsigned *count) { return small(device, "mig", count); }
int nvmlDeviceGetMigDeviceHandleByIndex(Device *device, unsigned place, Device **instance) {
  char uuid[128];
  if (place >= INSTANCES_MAX) return INVALID_ARGUMENT;
  Device *found = &devices[device->gpu][place];
  found->gpu = device->gpu;
  found->instance = (int)place;
  if (ask(found, "uuid", uuid, sizeof uuid) != SUCCESS) return NOT_FOUND;
  *instance = found;
  return SUCCESS;
}

int nvmlEventSetCreate(void **set) { static int one; *set = &one; return SUCCESS; }
int nvmlEventSetFree(void *set) { (void)set; return SUCCESS; }
int nvmlDeviceGetSupportedEventTypes(Device *device, unsigned long long *types) { (void)device; *types = 0xF; return SUCCESS; }
int nvmlDeviceRegisterEvents(Device *device, unsigned long long types, void *set) { (void)device; (void)types; (void)set; return SUCCESS; }

// The event of each GPU that was told last.
static unsigned long seen[GPUS_MAX];

typedef struct { Device *device; unsigned long long type, data; unsigned gpu_instance, compute_instance; } EventData;
int nvmlEventSetWait_v2(void *set, EventData *event, unsigned timeout_ms) {
  (void)set;
  for (unsigned waited = 0; waited < timeout_ms; waited += 200) {
    static unsigned looked;
    unsigned count;
    if (nvmlDeviceGetCount_v2(&count) != SUCCESS || looked == version) count = 0;
    unsigned looking = version;
    for (unsigned gpu = 0; gpu < count && gpu < GPUS_MAX; gpu++) {
      char key[64], value[64];
      unsigned long serial, xid;
      snprintf(key, sizeof key, "%u.xid", gpu);
      if (find(key, value, sizeof value) != SUCCESS || sscanf(value, "%lu %lu", &serial, &xid) != 2) continue;
      if (serial > seen[gpu]) {
        seen[gpu] = serial;
        EventData found = {&devices[gpu][INSTANCES_MAX], 8, xid, ~0u, ~0u};
        *event = found;
        return SUCCESS;
      }
    }
    looked = looking;
    usleep(200000);
  }
  return TIMEOUT;
}
#endif
