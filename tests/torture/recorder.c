/* Records every change of a file system that this process makes through libc, in order, with its data.
 *
 * Loaded by LD_PRELOAD. WRITE_LOG names the log. A change and its record are made under one lock, so the order of
 * records is the order of changes among the threads of a process. Records of several processes interleave as whole
 * records, but their order is not exact.
 *
 * Not seen: raw system calls that bypass libc, and stores through mmap. syscall() aborts on a call that writes. The
 * replayer compares its last state with the real folders, so a change that was not seen fails the recording.
 *
 * A record: u32 length of the rest, u8 kind, u64 numbers[10], then two texts, each u32 length and bytes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>
#include <utime.h>

#define REAL(name) ((__typeof__(&name))real(#name))

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int log_file = -1;

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) {
        fprintf(stderr, "recorder: libc has no %s\n", name);
        abort();
    }
    return found;
}

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("WRITE_LOG");
    if (!path) return;
    int file = REAL(open)(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    log_file = fcntl(file, F_DUPFD_CLOEXEC, 700);
    REAL(close)(file);
}

static void put(char kind, const uint64_t *numbers, const void *first, size_t first_size, const void *second,
                size_t second_size) {
    if (log_file < 0) return;
    size_t rest = 1 + 80 + 4 + first_size + 4 + second_size;
    char *record = malloc(4 + rest), *at = record;
    uint32_t length = (uint32_t)rest, one = (uint32_t)first_size, two = (uint32_t)second_size;
    memcpy(at, &length, 4), at += 4;
    *at++ = kind;
    memcpy(at, numbers, 80), at += 80;
    memcpy(at, &one, 4), at += 4;
    memcpy(at, first, first_size), at += first_size;
    memcpy(at, &two, 4), at += 4;
    memcpy(at, second, second_size);
    if (REAL(write)(log_file, record, 4 + rest) != (ssize_t)(4 + rest)) abort();
    free(record);
}

static int regular(int file, struct stat *found) { return fstat(file, found) == 0 && S_ISREG(found->st_mode); }

/* N: what is under a name after the change. numbers: device and inode of the folder, device and inode under the name
 * (0: nothing), mode, rdev, 1 where the inode is new, 1 where the next record belongs to the same change, uid, mtime. */
static void put_name(int folder, const char *path, int is_new, int more) {
    char above[PATH_MAX], target[PATH_MAX];
    size_t end = strlen(path);
    while (end > 1 && path[end - 1] == '/') end--;
    size_t begin = end;
    while (begin > 0 && path[begin - 1] != '/') begin--;
    if (begin == 0) strcpy(above, ".");
    else snprintf(above, sizeof above, "%.*s", (int)begin, path);
    char name[NAME_MAX + 1];
    snprintf(name, sizeof name, "%.*s", (int)(end - begin), path + begin);
    struct stat parent, found = {0};
    if (fstatat(folder, above, &parent, 0) != 0) return;
    ssize_t size = 0;
    if (fstatat(folder, path, &found, AT_SYMLINK_NOFOLLOW) != 0) memset(&found, 0, sizeof found);
    else if (S_ISLNK(found.st_mode) && (size = readlinkat(folder, path, target, sizeof target)) < 0) size = 0;
    uint64_t numbers[10] = {parent.st_dev, parent.st_ino, found.st_dev, found.st_ino, found.st_mode, found.st_rdev,
                            is_new, more, found.st_uid, found.st_mtim.tv_sec * 1000000000ull + found.st_mtim.tv_nsec};
    put('N', numbers, name, strlen(name), target, size);
}

/* W: bytes at an offset. */
static void put_data(int file, off_t offset, size_t count) {
    struct stat found;
    if (!count || !regular(file, &found)) return;
    char path[64], *data = malloc(count);
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    int reading = REAL(open)(path, O_RDONLY | O_CLOEXEC);
    ssize_t got = reading < 0 ? -1 : pread(reading, data, count, offset);
    if (got != (ssize_t)count) {
        fprintf(stderr, "recorder: what was written cannot be read again\n");
        abort();
    }
    REAL(close)(reading);
    uint64_t numbers[10] = {found.st_dev, found.st_ino, offset};
    put('W', numbers, data, count, "", 0);
    free(data);
}

static void put_status(char kind, const struct stat *found) {
    uint64_t numbers[10] = {found->st_dev, found->st_ino, found->st_size, found->st_mode, found->st_uid,
                            found->st_mtim.tv_sec * 1000000000ull + found->st_mtim.tv_nsec};
    put(kind, numbers, "", 0, "", 0);
}

static void put_status_of(char kind, int file) {
    struct stat found;
    if (fstat(file, &found) == 0) put_status(kind, &found);
}

static void put_status_at(char kind, int folder, const char *path, int flags) {
    struct stat found;
    if (fstatat(folder, path ? path : "", &found, (flags & AT_SYMLINK_NOFOLLOW) | (path ? 0 : AT_EMPTY_PATH)) == 0)
        put_status(kind, &found);
}

/* Where the next write of a descriptor goes. */
static off_t place(int file) {
    struct stat found;
    if (fcntl(file, F_GETFL) & O_APPEND && fstat(file, &found) == 0) return found.st_size;
    return lseek(file, 0, SEEK_CUR);
}

static int opened(int folder, const char *path, int flags, mode_t mode) {
    if (!(flags & (O_CREAT | O_TRUNC))) return REAL(openat)(folder, path, flags, mode);
    if ((flags & O_TMPFILE) == O_TMPFILE) abort();
    pthread_mutex_lock(&lock);
    struct stat before;
    int was = fstatat(folder, path, &before, flags & O_NOFOLLOW ? AT_SYMLINK_NOFOLLOW : 0) == 0;
    int file = REAL(openat)(folder, path, flags, mode);
    int code = errno;
    if (file >= 0 && !was) put_name(folder, path, 1, 0);
    if (file >= 0 && was && flags & O_TRUNC && S_ISREG(before.st_mode)) put_status_of('T', file);
    pthread_mutex_unlock(&lock);
    errno = code;
    return file;
}

static mode_t mode_of(int flags, va_list rest) {
    return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(rest, mode_t) : 0;
}

#define OPEN(name)                                   \
    int name(const char *path, int flags, ...) {     \
        va_list rest;                                \
        va_start(rest, flags);                       \
        mode_t mode = mode_of(flags, rest);          \
        va_end(rest);                                \
        return opened(AT_FDCWD, path, flags, mode);  \
    }
#define OPENAT(name)                                         \
    int name(int folder, const char *path, int flags, ...) { \
        va_list rest;                                        \
        va_start(rest, flags);                               \
        mode_t mode = mode_of(flags, rest);                  \
        va_end(rest);                                        \
        return opened(folder, path, flags, mode);            \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* A call whose result is the number of bytes that were written to `file` at `offset`. */
#define WRITING(file, offset, call)              \
    struct stat found_;                          \
    if (!regular(file, &found_)) return call;    \
    pthread_mutex_lock(&lock);                   \
    off_t at_ = offset;                          \
    ssize_t count_ = call;                       \
    int code_ = errno;                           \
    if (count_ > 0) put_data(file, at_, count_); \
    pthread_mutex_unlock(&lock);                 \
    errno = code_;                               \
    return count_;

ssize_t write(int file, const void *data, size_t size) { WRITING(file, place(file), REAL(write)(file, data, size)) }
ssize_t writev(int file, const struct iovec *parts, int count) {
    WRITING(file, place(file), REAL(writev)(file, parts, count))
}
ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
    WRITING(file, offset, REAL(pwrite)(file, data, size, offset))
}
ssize_t pwrite64(int file, const void *data, size_t size, off_t offset) {
    WRITING(file, offset, REAL(pwrite)(file, data, size, offset))
}
ssize_t pwritev(int file, const struct iovec *parts, int count, off_t offset) {
    WRITING(file, offset, REAL(pwritev)(file, parts, count, offset))
}
ssize_t pwritev64(int file, const struct iovec *parts, int count, off_t offset) {
    WRITING(file, offset, REAL(pwritev)(file, parts, count, offset))
}
ssize_t pwritev2(int file, const struct iovec *parts, int count, off_t offset, int flags) {
    WRITING(file, offset < 0 ? place(file) : offset, REAL(pwritev2)(file, parts, count, offset, flags))
}
ssize_t pwritev64v2(int file, const struct iovec *parts, int count, off64_t offset, int flags) {
    WRITING(file, offset < 0 ? place(file) : offset, REAL(pwritev2)(file, parts, count, offset, flags))
}
ssize_t sendfile(int file, int source, off_t *offset, size_t size) {
    WRITING(file, place(file), REAL(sendfile)(file, source, offset, size))
}
ssize_t sendfile64(int file, int source, off_t *offset, size_t size) {
    WRITING(file, place(file), REAL(sendfile)(file, source, offset, size))
}
ssize_t copy_file_range(int source, off_t *from, int file, off_t *to, size_t size, unsigned flags) {
    WRITING(file, to ? *to : place(file), REAL(copy_file_range)(source, from, file, to, size, flags))
}
ssize_t splice(int source, off_t *from, int file, off_t *to, size_t size, unsigned flags) {
    WRITING(file, to ? *to : place(file), REAL(splice)(source, from, file, to, size, flags))
}

int ioctl(int file, unsigned long request, ...) {
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (request == FICLONERANGE) abort();
    if (request != FICLONE) return REAL(ioctl)(file, request, argument);
    pthread_mutex_lock(&lock);
    int result = REAL(ioctl)(file, request, argument);
    int code = errno;
    struct stat found;
    if (result == 0 && fstat(file, &found) == 0) put_status('T', &found), put_data(file, 0, found.st_size);
    pthread_mutex_unlock(&lock);
    errno = code;
    return result;
}

/* A call that returns 0 when its change is made, and what is recorded of it then. */
#define CHANGING(call, record)   \
    pthread_mutex_lock(&lock);   \
    int result_ = call;          \
    int code_ = errno;           \
    if (result_ == 0) { record; } \
    pthread_mutex_unlock(&lock); \
    errno = code_;               \
    return result_;

int ftruncate(int file, off_t size) { CHANGING(REAL(ftruncate)(file, size), put_status_of('T', file)) }
int ftruncate64(int file, off_t size) { CHANGING(REAL(ftruncate)(file, size), put_status_of('T', file)) }
int truncate(const char *path, off_t size) {
    CHANGING(REAL(truncate)(path, size), put_status_at('T', AT_FDCWD, path, 0))
}
int truncate64(const char *path, off_t size) {
    CHANGING(REAL(truncate)(path, size), put_status_at('T', AT_FDCWD, path, 0))
}
int fallocate(int file, int mode, off_t offset, off_t size) {
    if (mode) abort();
    CHANGING(REAL(fallocate)(file, mode, offset, size), put_status_of('T', file))
}
int fallocate64(int file, int mode, off_t offset, off_t size) { return fallocate(file, mode, offset, size); }
int posix_fallocate(int file, off_t offset, off_t size) {
    CHANGING(REAL(posix_fallocate)(file, offset, size), put_status_of('T', file))
}
int posix_fallocate64(int file, off_t offset, off_t size) { return posix_fallocate(file, offset, size); }

#define BOTH(folder, old, other, new) put_name(folder, old, 0, 1), put_name(other, new, 0, 0)
int renameat2(int folder, const char *old, int other, const char *new, unsigned flags) {
    CHANGING(REAL(renameat2)(folder, old, other, new, flags), BOTH(folder, old, other, new))
}
int renameat(int folder, const char *old, int other, const char *new) {
    CHANGING(REAL(renameat)(folder, old, other, new), BOTH(folder, old, other, new))
}
int rename(const char *old, const char *new) {
    CHANGING(REAL(rename)(old, new), BOTH(AT_FDCWD, old, AT_FDCWD, new))
}
int linkat(int folder, const char *old, int other, const char *new, int flags) {
    CHANGING(REAL(linkat)(folder, old, other, new, flags), put_name(other, new, 0, 0))
}
int link(const char *old, const char *new) { CHANGING(REAL(link)(old, new), put_name(AT_FDCWD, new, 0, 0)) }
int symlinkat(const char *target, int folder, const char *path) {
    CHANGING(REAL(symlinkat)(target, folder, path), put_name(folder, path, 1, 0))
}
int symlink(const char *target, const char *path) {
    CHANGING(REAL(symlink)(target, path), put_name(AT_FDCWD, path, 1, 0))
}
int unlinkat(int folder, const char *path, int flags) {
    CHANGING(REAL(unlinkat)(folder, path, flags), put_name(folder, path, 0, 0))
}
int unlink(const char *path) { CHANGING(REAL(unlink)(path), put_name(AT_FDCWD, path, 0, 0)) }
int rmdir(const char *path) { CHANGING(REAL(rmdir)(path), put_name(AT_FDCWD, path, 0, 0)) }
int remove(const char *path) { CHANGING(REAL(remove)(path), put_name(AT_FDCWD, path, 0, 0)) }
int mkdirat(int folder, const char *path, mode_t mode) {
    CHANGING(REAL(mkdirat)(folder, path, mode), put_name(folder, path, 1, 0))
}
int mkdir(const char *path, mode_t mode) { CHANGING(REAL(mkdir)(path, mode), put_name(AT_FDCWD, path, 1, 0)) }
int mknodat(int folder, const char *path, mode_t mode, dev_t device) {
    CHANGING(REAL(mknodat)(folder, path, mode, device), put_name(folder, path, 1, 0))
}
int mknod(const char *path, mode_t mode, dev_t device) { return mknodat(AT_FDCWD, path, mode, device); }
int mkfifoat(int folder, const char *path, mode_t mode) { return mknodat(folder, path, mode | S_IFIFO, 0); }
int mkfifo(const char *path, mode_t mode) { return mknodat(AT_FDCWD, path, mode | S_IFIFO, 0); }

int chmod(const char *path, mode_t mode) { CHANGING(REAL(chmod)(path, mode), put_status_at('A', AT_FDCWD, path, 0)) }
int fchmod(int file, mode_t mode) { CHANGING(REAL(fchmod)(file, mode), put_status_of('A', file)) }
int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    CHANGING(REAL(fchmodat)(folder, path, mode, flags), put_status_at('A', folder, path, flags))
}
int chown(const char *path, uid_t uid, gid_t gid) {
    CHANGING(REAL(chown)(path, uid, gid), put_status_at('A', AT_FDCWD, path, 0))
}
int lchown(const char *path, uid_t uid, gid_t gid) {
    CHANGING(REAL(lchown)(path, uid, gid), put_status_at('A', AT_FDCWD, path, AT_SYMLINK_NOFOLLOW))
}
int fchown(int file, uid_t uid, gid_t gid) { CHANGING(REAL(fchown)(file, uid, gid), put_status_of('A', file)) }
int fchownat(int folder, const char *path, uid_t uid, gid_t gid, int flags) {
    CHANGING(REAL(fchownat)(folder, path, uid, gid, flags), put_status_at('A', folder, path, flags))
}
int utimensat(int folder, const char *path, const struct timespec times[2], int flags) {
    CHANGING(REAL(utimensat)(folder, path, times, flags), put_status_at('A', folder, path, flags))
}
int futimens(int file, const struct timespec times[2]) {
    CHANGING(REAL(futimens)(file, times), put_status_of('A', file))
}
int utimes(const char *path, const struct timeval times[2]) {
    CHANGING(REAL(utimes)(path, times), put_status_at('A', AT_FDCWD, path, 0))
}
int lutimes(const char *path, const struct timeval times[2]) {
    CHANGING(REAL(lutimes)(path, times), put_status_at('A', AT_FDCWD, path, AT_SYMLINK_NOFOLLOW))
}
int futimes(int file, const struct timeval times[2]) {
    CHANGING(REAL(futimes)(file, times), put_status_of('A', file))
}

/* X: an extended attribute; the last number is 1 where it was removed. */
static void put_attribute(const struct stat *found, const char *name, const void *value, size_t size, int is_gone) {
    uint64_t numbers[10] = {found->st_dev, found->st_ino, is_gone};
    put('X', numbers, name, strlen(name), value, size);
}
#define ATTRIBUTE(call, look, value, size, is_gone) \
    struct stat here_;                              \
    CHANGING(call, if (look == 0) put_attribute(&here_, name, value, size, is_gone))
int fsetxattr(int file, const char *name, const void *value, size_t size, int flags) {
    ATTRIBUTE(REAL(fsetxattr)(file, name, value, size, flags), fstat(file, &here_), value, size, 0)
}
int setxattr(const char *path, const char *name, const void *value, size_t size, int flags) {
    ATTRIBUTE(REAL(setxattr)(path, name, value, size, flags), stat(path, &here_), value, size, 0)
}
int lsetxattr(const char *path, const char *name, const void *value, size_t size, int flags) {
    ATTRIBUTE(REAL(lsetxattr)(path, name, value, size, flags), lstat(path, &here_), value, size, 0)
}
int fremovexattr(int file, const char *name) {
    ATTRIBUTE(REAL(fremovexattr)(file, name), fstat(file, &here_), "", 0, 1)
}
int removexattr(const char *path, const char *name) {
    ATTRIBUTE(REAL(removexattr)(path, name), stat(path, &here_), "", 0, 1)
}
int lremovexattr(const char *path, const char *name) {
    ATTRIBUTE(REAL(lremovexattr)(path, name), lstat(path, &here_), "", 0, 1)
}

/* S: one file or folder is on the disk; F: one file system is; Y: all are. */
int fsync(int file) { CHANGING(REAL(fsync)(file), put_status_of('S', file)) }
int fdatasync(int file) { CHANGING(REAL(fdatasync)(file), put_status_of('S', file)) }
int syncfs(int file) { CHANGING(REAL(syncfs)(file), put_status_of('F', file)) }
void sync(void) {
    uint64_t numbers[10] = {0};
    pthread_mutex_lock(&lock);
    REAL(sync)();
    put('Y', numbers, "", 0, "", 0);
    pthread_mutex_unlock(&lock);
}

long syscall(long number, ...) {
    static const long writing[] = {SYS_renameat2, SYS_syncfs, SYS_fsync, SYS_fdatasync, SYS_write, SYS_pwrite64,
                                   SYS_openat, SYS_unlinkat, SYS_mkdirat, SYS_linkat, SYS_symlinkat, SYS_ftruncate,
                                   SYS_copy_file_range, SYS_fchmodat, SYS_utimensat};
    for (size_t each = 0; each < sizeof writing / sizeof *writing; each++)
        if (number == writing[each]) {
            fprintf(stderr, "recorder: syscall(%ld) changes files and is not recorded\n", number);
            abort();
        }
    va_list rest;
    long arguments[6];
    va_start(rest, number);
    for (int each = 0; each < 6; each++) arguments[each] = va_arg(rest, long);
    va_end(rest);
    return REAL(syscall)(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
}
