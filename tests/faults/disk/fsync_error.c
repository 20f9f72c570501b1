/* Preloaded into a program: once the file FSYNC_ERROR_FILE exists, fsync of files whose path holds FSYNC_ERROR_IN fails. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int fsync(int file) {
  static int (*real)(int);
  if (!real) real = dlsym(RTLD_NEXT, "fsync");
  const char *switch_on = getenv("FSYNC_ERROR_FILE"), *below = getenv("FSYNC_ERROR_IN");
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (switch_on && below && length > 0 && access(switch_on, F_OK) == 0) {
    path[length] = 0;
    if (strstr(path, below)) {
      errno = EIO;
      return -1;
    }
  }
  return real(file);
}
