/* Stands between a program and the disk: counts the calls on files below one directory, and at a
 * chosen one fails, does half of it, kills the process or signals it.
 *
 * Preloaded, and idle until chaos_arm() is called, by ctypes or from CHAOS_* variables. With a log
 * it notes every call; with a directory to save to it also notes what the call destroyed, before it
 * does, and moves aside what would be removed: enough to undo whatever a power cut could have lost.
 * Then one call goes at a time. The system is called directly: nothing here calls what it wraps.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

/* The same numbers as in chaos_shim.py. */
enum kind { OPEN = 1, CREATE, READ, WRITE, SYNC, RANGE, SIZE, RENAME, EXCHANGE, UNLINK, RMDIR, MKDIR, COPY };
enum action { NOTHING, FAIL, SHORT, KILL_BEFORE, KILL_HALF, KILL_AFTER, SIGNAL };
enum phase { BEGIN, END };

struct record {
    uint32_t magic, kind, phase, reserved;
    uint64_t number, inode;
    int64_t offset, length, old_size, result;
    uint32_t path_bytes, other_bytes;
    uint64_t data_bytes;
};

static char prefix[PATH_MAX], save[PATH_MAX];
static size_t prefix_length;
static atomic_int armed;
static atomic_long calls, saved;
static long first_call, last_call;
static int action, value, kinds, log_file = -1;
static int64_t nanoseconds_a_mib;
static atomic_long *bytes_seen; /* read, written: in shared memory, which outlives a SIGKILL */
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

void chaos_arm(const char *below, int log, const char *saving, long first, long last, int what, int with, int which)
{
    strncpy(prefix, below, sizeof prefix - 1);
    strncpy(save, saving, sizeof save - 1);
    prefix_length = strlen(prefix);
    log_file = log;
    first_call = first;
    last_call = last;
    action = what;
    value = with;
    kinds = which;
    atomic_store(&calls, 0);
    atomic_store(&saved, getpid() * 100000L); /* no number twice in a log of several processes */
    atomic_store(&armed, 1);
}

void chaos_disarm(void) { atomic_store(&armed, 0); }

long chaos_calls(void) { return atomic_load(&calls); }

__attribute__((constructor)) static void from_environment(void)
{
    const char *below = getenv("CHAOS_BELOW"), *counters = getenv("CHAOS_COUNTERS");
    const char *slow = getenv("CHAOS_NANOSECONDS_A_MIB");
    if (!below || !counters)
        return;
    int file = syscall(SYS_openat, AT_FDCWD, counters, O_RDWR | O_CLOEXEC, 0);
    void *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared != MAP_FAILED)
        bytes_seen = shared;
    nanoseconds_a_mib = slow ? atoll(slow) : 0;
    chaos_arm(below, -1, "", 0, 0, NOTHING, 0, 0);
}

static int below(const char *path)
{
    return !strncmp(path, prefix, prefix_length) && (path[prefix_length] == '/' || !path[prefix_length]);
}

static int by_descriptor(int fd, char *path)
{
    char link[64];
    int keep = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    errno = keep;
    path[length > 0 ? length : 0] = 0;
    return length > 0 && path[0] == '/' && below(path);
}

/* Whether `name`, relative to `fd`, is one that counts; its full path. */
static int by_name(int fd, const char *name, char *path)
{
    char from[PATH_MAX];
    if (!atomic_load(&armed) || !name)
        return 0;
    if (!strncmp(name, "/proc/self/fd/", 14))
        return by_descriptor(atoi(name + 14), path);
    if (name[0] == '/')
        from[0] = 0;
    else if (fd == AT_FDCWD) {
        if (syscall(SYS_getcwd, from, sizeof from) < 0)
            return 0;
    } else
        by_descriptor(fd, from);
    snprintf(path, PATH_MAX, "%s%s%s", from, from[0] ? "/" : "", name);
    return below(path);
}

static int watched(int fd, char *path) { return atomic_load(&armed) && by_descriptor(fd, path); }

struct call {
    struct record record;
    const char *path, *other;
    int doing, half, locked;
};

static void note(struct call *call, const void *data)
{
    call->record.path_bytes = call->path ? strlen(call->path) : 0;
    call->record.other_bytes = call->other ? strlen(call->other) : 0;
    struct iovec parts[] = {
        {&call->record, sizeof call->record},
        {(void *)call->path, call->record.path_bytes},
        {(void *)call->other, call->record.other_bytes},
        {(void *)data, call->record.data_bytes},
    };
    if (log_file >= 0 && syscall(SYS_writev, log_file, parts, 4) < 0)
        abort();
    call->record.data_bytes = 0;
}

static struct call begin(int kind, const char *path, const char *other)
{
    struct call call = {.record = {.magic = 0x63616f73, .kind = kind}, .path = path, .other = other};
    if (save[0]) {
        pthread_mutex_lock(&one_at_a_time);
        call.locked = 1;
    }
    call.record.number = atomic_fetch_add(&calls, 1) + 1;
    long number = call.record.number;
    int chosen = number == first_call || (number > first_call && number <= last_call && (kinds >> kind & 1));
    call.doing = first_call && chosen ? action : NOTHING;
    return call;
}

/* Notes the call, with what it is about to destroy; true if it is not to be done at all. */
static int refused(struct call *call, const void *old)
{
    call->record.phase = BEGIN;
    note(call, old);
    if (call->doing == KILL_BEFORE)
        syscall(SYS_kill, getpid(), SIGKILL);
    if (call->doing == SIGNAL)
        syscall(SYS_kill, getpid(), value);
    return call->doing == FAIL;
}

static long finish(struct call *call, long result)
{
    int code = call->doing == FAIL ? value : errno;
    call->record.phase = END;
    call->record.result = result < 0 ? -code : result;
    note(call, NULL);
    if (call->doing == KILL_AFTER || call->doing == KILL_HALF)
        syscall(SYS_kill, getpid(), SIGKILL);
    if (call->locked)
        pthread_mutex_unlock(&one_at_a_time);
    errno = code;
    return result;
}

/* As many bytes as the call is to move. */
static size_t portion(const struct call *call, size_t length)
{
    if (call->doing == KILL_HALF || (call->doing == SHORT && !value))
        return length > 1 ? length / 2 : length;
    return call->doing == SHORT && length ? 1 : length;
}

static void seen(int which, ssize_t count)
{
    if (count <= 0 || !bytes_seen)
        return;
    atomic_fetch_add(&bytes_seen[which], count);
    if (nanoseconds_a_mib && which == 0) {
        int64_t pause = count * nanoseconds_a_mib >> 20;
        struct timespec time = {pause / 1000000000, pause % 1000000000};
        nanosleep(&time, NULL);
    }
}

/* The bytes that a write of `length` at `offset` covers, and the size: what undoing it needs. */
static void *covered(struct call *call, int fd, off_t offset, size_t length)
{
    struct stat status;
    call->record.offset = offset;
    call->record.length = length;
    if (fstat(fd, &status))
        return NULL;
    call->record.inode = status.st_ino;
    call->record.old_size = status.st_size;
    if (!save[0])
        return NULL;
    int readable = fd;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    readable = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC, 0);
    void *data = malloc(length + 1);
    ssize_t count = syscall(SYS_pread64, readable, data, length, offset);
    syscall(SYS_close, readable);
    call->record.data_bytes = count > 0 ? count : 0;
    return data;
}

static ssize_t put(int fd, const void *data, size_t length, off_t at, int positioned)
{
    char path[PATH_MAX];
    if (!watched(fd, path))
        return positioned ? syscall(SYS_pwrite64, fd, data, length, at) : syscall(SYS_write, fd, data, length);
    struct call call = begin(WRITE, path, NULL);
    off_t where = at;
    if (!positioned) {
        struct stat status;
        int flags = syscall(SYS_fcntl, fd, F_GETFL);
        where = flags & O_APPEND && !fstat(fd, &status) ? status.st_size : syscall(SYS_lseek, fd, 0, SEEK_CUR);
    }
    void *old = covered(&call, fd, where, length);
    int failed = refused(&call, old);
    free(old);
    ssize_t result = -1;
    if (!failed) {
        size_t part = portion(&call, length);
        result = positioned ? syscall(SYS_pwrite64, fd, data, part, at) : syscall(SYS_write, fd, data, part);
        seen(1, result);
    }
    return finish(&call, result);
}

ssize_t write(int fd, const void *data, size_t length) { return put(fd, data, length, 0, 0); }
ssize_t pwrite(int fd, const void *data, size_t length, off_t at) { return put(fd, data, length, at, 1); }
ssize_t pwrite64(int fd, const void *data, size_t length, off_t at) { return put(fd, data, length, at, 1); }

static ssize_t get(int fd, const struct iovec *parts, int count, off_t at, int positioned, int flags)
{
    char path[PATH_MAX];
    struct iovec first = parts[0];
    size_t length = first.iov_len;
    int counts = watched(fd, path);
    struct call call;
    if (counts) {
        call = begin(READ, path, NULL);
        call.record.offset = positioned ? at : -1;
        call.record.length = length;
        if (refused(&call, NULL))
            return finish(&call, -1);
        if (portion(&call, length) != length) {
            first.iov_len = portion(&call, length);
            parts = &first;
            count = 1;
        }
    }
    ssize_t result = !positioned ? syscall(SYS_readv, fd, parts, count)
                                 : syscall(SYS_preadv2, fd, parts, count, at, 0, flags);
    if (!counts)
        return result;
    seen(0, result);
    return finish(&call, result);
}

ssize_t read(int fd, void *data, size_t length)
{
    struct iovec part = {data, length};
    return get(fd, &part, 1, 0, 0, 0);
}
ssize_t __read_chk(int fd, void *data, size_t length, size_t room) { return read(fd, data, length); }
ssize_t pread(int fd, void *data, size_t length, off_t at)
{
    struct iovec part = {data, length};
    return get(fd, &part, 1, at, 1, 0);
}
ssize_t pread64(int fd, void *data, size_t length, off_t at) { return pread(fd, data, length, at); }
ssize_t __pread_chk(int fd, void *data, size_t length, off_t at, size_t room) { return pread(fd, data, length, at); }
ssize_t __pread64_chk(int fd, void *data, size_t length, off_t at, size_t room) { return pread(fd, data, length, at); }
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t at) { return get(fd, parts, count, at, 1, 0); }
ssize_t preadv64(int fd, const struct iovec *parts, int count, off_t at) { return get(fd, parts, count, at, 1, 0); }
ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t at, int flags)
{
    return get(fd, parts, count, at, 1, flags);
}
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off_t at, int flags)
{
    return get(fd, parts, count, at, 1, flags);
}

ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t length, unsigned flags)
{
    char path[PATH_MAX];
    if (!watched(out, path))
        return syscall(SYS_copy_file_range, in, from, out, to, length, flags);
    struct call call = begin(COPY, path, NULL);
    void *old = covered(&call, out, to ? *to : 0, length);
    int failed = refused(&call, old);
    free(old);
    ssize_t result = -1;
    if (!failed) {
        result = syscall(SYS_copy_file_range, in, from, out, to, portion(&call, length), flags);
        seen(0, result);
        seen(1, result);
    }
    return finish(&call, result);
}

static int synced(int fd, int number)
{
    char path[PATH_MAX];
    if (!watched(fd, path))
        return syscall(number, fd);
    struct stat status = {0};
    fstat(fd, &status);
    struct call call = begin(SYNC, path, NULL);
    call.record.inode = status.st_ino;
    return finish(&call, refused(&call, NULL) ? -1 : syscall(number, fd));
}

int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

int sync_file_range(int fd, off_t offset, off_t length, unsigned flags)
{
    char path[PATH_MAX];
    if (!watched(fd, path))
        return syscall(SYS_sync_file_range, fd, offset, length, flags);
    struct call call = begin(RANGE, path, NULL);
    return finish(&call, refused(&call, NULL) ? -1 : syscall(SYS_sync_file_range, fd, offset, length, flags));
}

/* A new size; what lies beyond it is what undoing needs. */
static int sized(int fd, const char *name, off_t size, int fallocating, int mode, off_t length)
{
    char path[PATH_MAX];
    int own = -1, counts = name ? by_name(AT_FDCWD, name, path) : watched(fd, path);
    if (!counts) {
        if (fallocating)
            return syscall(SYS_fallocate, fd, mode, size, length);
        return name ? syscall(SYS_truncate, name, size) : syscall(SYS_ftruncate, fd, size);
    }
    if (name)
        fd = own = syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC, 0);
    struct call call = begin(SIZE, path, NULL);
    struct stat status = {0};
    fstat(fd, &status);
    off_t target = fallocating ? size + length : size;
    size_t lost = !fallocating && status.st_size > target ? status.st_size - target : 0;
    void *old = covered(&call, fd, target, lost);
    int failed = refused(&call, old);
    free(old);
    long result = -1;
    if (!failed) {
        if (fallocating)
            result = syscall(SYS_fallocate, fd, mode, size, length);
        else
            result = name ? syscall(SYS_truncate, name, size) : syscall(SYS_ftruncate, fd, size);
    }
    int code = errno;
    if (own >= 0)
        syscall(SYS_close, own);
    errno = code;
    return finish(&call, result);
}

int ftruncate(int fd, off_t size) { return sized(fd, NULL, size, 0, 0, 0); }
int ftruncate64(int fd, off_t size) { return sized(fd, NULL, size, 0, 0, 0); }
int truncate(const char *name, off_t size) { return sized(-1, name, size, 0, 0, 0); }
int truncate64(const char *name, off_t size) { return sized(-1, name, size, 0, 0, 0); }
int fallocate(int fd, int mode, off_t offset, off_t length) { return sized(fd, NULL, offset, 1, mode, length); }
int fallocate64(int fd, int mode, off_t offset, off_t length) { return sized(fd, NULL, offset, 1, mode, length); }

static int opened(int at, const char *name, int flags, mode_t mode)
{
    char path[PATH_MAX];
    if (!by_name(at, name, path))
        return syscall(SYS_openat, at, name, flags, mode);
    struct stat status;
    int code = errno, there = !fstatat(at, name, &status, 0);
    errno = code;
    struct call call = begin(flags & O_CREAT && !there ? CREATE : OPEN, path, NULL);
    int failed;
    if (there && flags & O_TRUNC && status.st_size && save[0]) {
        int own = syscall(SYS_openat, at, name, O_RDONLY | O_CLOEXEC, 0);
        call.record.kind = SIZE;
        void *old = covered(&call, own, 0, status.st_size);
        syscall(SYS_close, own);
        failed = refused(&call, old);
        free(old);
    } else
        failed = refused(&call, NULL);
    return finish(&call, failed ? -1 : syscall(SYS_openat, at, name, flags, mode));
}

#define MODE(flags, mode)                                                                          \
    mode_t mode = 0;                                                                               \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                                         \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode = va_arg(rest, mode_t);                                                               \
        va_end(rest);                                                                              \
    }

int open(const char *name, int flags, ...) { MODE(flags, mode) return opened(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE(flags, mode) return opened(AT_FDCWD, name, flags, mode); }
int openat(int at, const char *name, int flags, ...) { MODE(flags, mode) return opened(at, name, flags, mode); }
int openat64(int at, const char *name, int flags, ...) { MODE(flags, mode) return opened(at, name, flags, mode); }
int __open_2(const char *name, int flags) { return opened(AT_FDCWD, name, flags, 0); }
int __open64_2(const char *name, int flags) { return opened(AT_FDCWD, name, flags, 0); }
int __openat_2(int at, const char *name, int flags) { return opened(at, name, flags, 0); }
int __openat64_2(int at, const char *name, int flags) { return opened(at, name, flags, 0); }

/* Where something that is removed is kept, in a log that can be undone; else an empty string. */
static void keeping(char *where)
{
    where[0] = 0;
    if (save[0])
        snprintf(where, PATH_MAX, "%.4000s/%ld", save, atomic_fetch_add(&saved, 1));
}

static int moved(int from_at, const char *from, int to_at, const char *to, unsigned flags)
{
    char path[PATH_MAX], other[PATH_MAX], kept[PATH_MAX];
    path[0] = other[0] = 0;
    int here = by_name(from_at, from, path), there = by_name(to_at, to, other);
    if (!here && !there)
        return syscall(SYS_renameat2, from_at, from, to_at, to, flags);
    struct call call = begin(flags & RENAME_EXCHANGE ? EXCHANGE : RENAME, path, other);
    call.record.length = -1; /* the number of what stood there, kept */
    if (refused(&call, NULL))
        return finish(&call, -1);
    struct stat status, old;
    if (save[0] && !flags && !fstatat(to_at, to, &status, AT_SYMLINK_NOFOLLOW) &&
        !fstatat(from_at, from, &old, AT_SYMLINK_NOFOLLOW) && S_ISREG(status.st_mode) && S_ISREG(old.st_mode)) {
        keeping(kept);
        call.record.length = atomic_load(&saved) - 1;
        syscall(SYS_linkat, to_at, to, AT_FDCWD, kept, 0);
    }
    return finish(&call, syscall(SYS_renameat2, from_at, from, to_at, to, flags));
}

int rename(const char *from, const char *to) { return moved(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return moved(a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { return moved(a, from, b, to, flags); }

static int is_empty(const char *path)
{
    DIR *directory = opendir(path);
    int names = 0;
    while (directory && readdir(directory))
        names++;
    if (directory)
        closedir(directory);
    return names <= 2;
}

/* Removes, or moves aside: then its inode stays what it is when that is undone. */
static int removed(int at, const char *name, int flags)
{
    char path[PATH_MAX], kept[PATH_MAX];
    if (!by_name(at, name, path))
        return syscall(SYS_unlinkat, at, name, flags);
    struct call call = begin(flags & AT_REMOVEDIR ? RMDIR : UNLINK, path, NULL);
    if (refused(&call, NULL))
        return finish(&call, -1);
    keeping(kept);
    call.record.length = atomic_load(&saved) - 1;
    struct stat status;
    int directory = !fstatat(at, name, &status, AT_SYMLINK_NOFOLLOW) && S_ISDIR(status.st_mode);
    if (!kept[0] || directory != !!(flags & AT_REMOVEDIR))
        return finish(&call, syscall(SYS_unlinkat, at, name, flags));
    if (directory && !is_empty(path)) {
        errno = ENOTEMPTY;
        return finish(&call, -1);
    }
    return finish(&call, syscall(SYS_renameat2, at, name, AT_FDCWD, kept, 0));
}

int unlink(const char *name) { return removed(AT_FDCWD, name, 0); }
int unlinkat(int at, const char *name, int flags) { return removed(at, name, flags); }
int rmdir(const char *name) { return removed(AT_FDCWD, name, AT_REMOVEDIR); }
int remove(const char *name)
{
    struct stat status;
    int directory = !lstat(name, &status) && S_ISDIR(status.st_mode);
    return removed(AT_FDCWD, name, directory ? AT_REMOVEDIR : 0);
}

static int made(int at, const char *name, mode_t mode)
{
    char path[PATH_MAX];
    if (!by_name(at, name, path))
        return syscall(SYS_mkdirat, at, name, mode);
    struct call call = begin(MKDIR, path, NULL);
    return finish(&call, refused(&call, NULL) ? -1 : syscall(SYS_mkdirat, at, name, mode));
}

int mkdir(const char *name, mode_t mode) { return made(AT_FDCWD, name, mode); }
int mkdirat(int at, const char *name, mode_t mode) { return made(at, name, mode); }
