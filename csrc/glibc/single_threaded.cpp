// libstdc++ asks glibc whether a process has one thread, and then counts references without
// atomics. glibc has had that word since 2.32 only; here the answer is that there may be more.
extern "C" {
extern __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
}
