/* Replaces flock in a process: it fails with the error FLOCK_ERROR, or succeeds for every process if that is 0. */
#include <errno.h>
#include <stdlib.h>

int flock(int file, int operation) {
    (void)file, (void)operation;
    const char *error = getenv("FLOCK_ERROR");
    errno = error ? atoi(error) : 0;
    return errno ? -1 : 0;
}
