/* Counts what a process allocates, of all its threads: LD_PRELOAD, with glibc. The file that ALLOCATIONS names has the
   number of allocations, and the bytes that are held. */

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

struct counts {
    atomic_long allocations, held;
};

static struct counts before_start, *counts = &before_start;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("ALLOCATIONS");
    int file = path ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (file < 0 || ftruncate(file, sizeof *counts))
        return;
    void *shared = mmap(NULL, sizeof *counts, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (shared != MAP_FAILED)
        counts = shared;
}

static void *allocated(void *memory) {
    atomic_fetch_add(&counts->allocations, 1);
    atomic_fetch_add(&counts->held, malloc_usable_size(memory));
    return memory;
}

static void released(void *memory) {
    atomic_fetch_sub(&counts->held, malloc_usable_size(memory));
}

void *malloc(size_t size) {
    return allocated(__libc_malloc(size));
}

void *calloc(size_t count, size_t size) {
    return allocated(__libc_calloc(count, size));
}

void *realloc(void *memory, size_t size) {
    released(memory);
    return allocated(__libc_realloc(memory, size));
}

void *memalign(size_t alignment, size_t size) {
    return allocated(__libc_memalign(alignment, size));
}

void *aligned_alloc(size_t alignment, size_t size) {
    return memalign(alignment, size);
}

int posix_memalign(void **memory, size_t alignment, size_t size) {
    *memory = memalign(alignment, size);
    return *memory ? 0 : ENOMEM;
}

void free(void *memory) {
    released(memory);
    __libc_free(memory);
}
