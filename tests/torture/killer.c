/* Ends this process with SIGKILL before its nth call that changes a file system, or after a time.
 *
 * Loaded by LD_PRELOAD. kill_at(n) and kill_after(ns) arm it; calls() returns the number of calls so far. A write that
 * the kill hits has written the first half of its bytes. The syncs are counted and do nothing, since a kill loses no
 * data of the page cache; power loss is the subject of recorder.c.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static long last = -1, count = 0;

void kill_at(long number) { last = number, count = 0; }
long calls(void) { return count; }

/* The kernel sends the signal, so it may hit any instruction. */
int kill_after(long nanoseconds) {
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL};
    struct itimerspec when = {.it_value = {nanoseconds / 1000000000, nanoseconds % 1000000000}};
    timer_t timer;
    return timer_create(CLOCK_MONOTONIC, &event, &timer) || timer_settime(timer, 0, &when, NULL);
}

/* Returns whether this call is the last one. */
static int is_last(void) { return __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST) == last; }

static void end(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static void step(void) {
    if (is_last()) end();
}

#define CALL(type, name, parameters, arguments) \
    type name parameters {                      \
        step();                                 \
        return REAL(name) arguments;            \
    }
#define SYNC(name, parameters) \
    int name parameters {      \
        step();                \
        return 0;              \
    }

static mode_t mode_of(int flags, va_list rest) { return flags & O_CREAT ? va_arg(rest, mode_t) : 0; }

#define OPEN(name, parameters, ...)                         \
    int name parameters {                                   \
        va_list rest;                                       \
        va_start(rest, flags);                              \
        mode_t mode = mode_of(flags, rest);                 \
        va_end(rest);                                       \
        if (flags & (O_CREAT | O_TRUNC)) step();            \
        return REAL(name)(__VA_ARGS__, flags, mode);        \
    }
OPEN(open, (const char *path, int flags, ...), path)
OPEN(open64, (const char *path, int flags, ...), path)
OPEN(openat, (int folder, const char *path, int flags, ...), folder, path)
OPEN(openat64, (int folder, const char *path, int flags, ...), folder, path)

static int is_file(int file) {
    struct stat status;
    return fstat(file, &status) == 0 && S_ISREG(status.st_mode);
}

ssize_t write(int file, const void *data, size_t size) {
    if (is_file(file) && is_last()) {
        REAL(write)(file, data, size / 2);
        end();
    }
    return REAL(write)(file, data, size);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
    if (is_file(file) && is_last()) {
        REAL(pwrite64)(file, data, size / 2, offset);
        end();
    }
    return REAL(pwrite64)(file, data, size, offset);
}
ssize_t copy_file_range(int source, off64_t *from, int file, off64_t *to, size_t size, unsigned flags) {
    if (is_last()) {
        REAL(copy_file_range)(source, from, file, to, size / 2, flags);
        end();
    }
    return REAL(copy_file_range)(source, from, file, to, size, flags);
}

CALL(int, ftruncate64, (int file, off64_t size), (file, size))
CALL(int, renameat2, (int folder, const char *old, int other, const char *new, unsigned flags),
     (folder, old, other, new, flags))
CALL(int, renameat, (int folder, const char *old, int other, const char *new), (folder, old, other, new))
CALL(int, rename, (const char *old, const char *new), (old, new))
CALL(int, linkat, (int folder, const char *old, int other, const char *new, int flags), (folder, old, other, new, flags))
CALL(int, link, (const char *old, const char *new), (old, new))
CALL(int, symlinkat, (const char *target, int folder, const char *path), (target, folder, path))
CALL(int, symlink, (const char *target, const char *path), (target, path))
CALL(int, unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
CALL(int, unlink, (const char *path), (path))
CALL(int, rmdir, (const char *path), (path))
CALL(int, mkdirat, (int folder, const char *path, mode_t mode), (folder, path, mode))
CALL(int, mkdir, (const char *path, mode_t mode), (path, mode))
CALL(int, chmod, (const char *path, mode_t mode), (path, mode))
CALL(int, fchmod, (int file, mode_t mode), (file, mode))
CALL(int, fchmodat, (int folder, const char *path, mode_t mode, int flags), (folder, path, mode, flags))
CALL(int, utimensat, (int folder, const char *path, const struct timespec times[2], int flags),
     (folder, path, times, flags))
CALL(int, futimens, (int file, const struct timespec times[2]), (file, times))
SYNC(fsync, (__attribute__((unused)) int file))
SYNC(fdatasync, (__attribute__((unused)) int file))
SYNC(syncfs, (__attribute__((unused)) int file))
void sync(void) { step(); }
