// Where the threads come from.
//
// torch brings an OpenMP runtime of its own (torch/lib/libgomp.so.1, or libgomp-<hash>.so.1 in older wheels).  Linking
// against the system's would load a second one, whose threads spin beside torch's for the same cores.  So nothing is
// linked: the runtime that is already in the process is looked up by name, and its two entry points are called.
// LLVM's and Intel's libomp export the same GNU entry points on Linux.
//
// macOS's libomp lacks the GNU names: there Grand Central Dispatch, which every process has, runs the loop (not tested
// on a Mac).  Without any runtime, and in a forked child, where the parent's team no longer exists and libgomp would wait
// for it for ever, plain std::threads are started for the one call.
#include "parallel.h"

#include "w8a8.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <cstring>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <link.h>
#endif
#ifdef __APPLE__
#include <dispatch/dispatch.h>
#endif

namespace w8a8 {
namespace {

struct OpenMp {
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned) = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  bool complete() const { return parallel && max_threads && in_parallel; }
};

OpenMp symbols_of(void *handle) {
  OpenMp o;
  o.parallel = reinterpret_cast<decltype(o.parallel)>(dlsym(handle, "GOMP_parallel"));
  o.max_threads = reinterpret_cast<decltype(o.max_threads)>(dlsym(handle, "omp_get_max_threads"));
  o.in_parallel = reinterpret_cast<decltype(o.in_parallel)>(dlsym(handle, "omp_in_parallel"));
  return o;
}

#ifdef __linux__
struct Found {
  std::string beside_torch, any;
};

int look_at(struct dl_phdr_info *info, size_t, void *data) {
  const char *path = info->dlpi_name ? info->dlpi_name : "";
  const char *slash = std::strrchr(path, '/');
  const char *file = slash ? slash + 1 : path;
  if (std::strncmp(file, "libgomp", 7) == 0 || std::strncmp(file, "libiomp", 7) == 0 ||
      std::strncmp(file, "libomp.", 7) == 0 || std::strncmp(file, "libomp-", 7) == 0) {
    Found *f = static_cast<Found *>(data);
    if (std::strstr(path, "/torch") && f->beside_torch.empty()) f->beside_torch = path;   // torch/lib, torch.libs
    if (f->any.empty()) f->any = path;
  }
  return 0;
}
#endif

struct Runtime {
  OpenMp omp;
  std::string name;
};

Runtime find_runtime() {
  Runtime r;
#ifdef __linux__
  Found found;
  dl_iterate_phdr(look_at, &found);
  const std::string &path = found.beside_torch.empty() ? found.any : found.beside_torch;
  if (!path.empty()) {
    // NOLOAD: only ever the copy that is there.  The handle is kept, so the runtime stays as long as we do.
    if (void *handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) r.omp = symbols_of(handle);
  }
  if (r.omp.complete()) r.name = "openmp " + path;
#endif
  if (!r.omp.complete()) {
    r.omp = symbols_of(RTLD_DEFAULT);   // linked into the program itself
    if (r.omp.complete()) r.name = "openmp";
  }
  if (!r.omp.complete()) {
    r.omp = OpenMp{};
    r.name = "threads";
  }
  return r;
}

std::atomic<bool> in_forked_child{false};
thread_local bool inside = false;   // a worker of ours: a loop inside a loop runs on the one thread

const Runtime &runtime() {
  static const Runtime r = find_runtime();
  return r;
}

// A constructor, so that the fork handler is there before the first fork even if the first call comes after it.
__attribute__((constructor)) void at_load() { pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true); }); }

struct Call {
  void (*fn)(void *);
  void *data;
};

void worker(void *p) {
  const Call *c = static_cast<const Call *>(p);
  const bool was = inside;
  inside = true;
  c->fn(c->data);
  inside = was;
}

bool use_openmp() { return runtime().omp.complete() && !in_forked_child.load(std::memory_order_relaxed); }

}  // namespace

int default_threads() {
  const int n = use_openmp() ? runtime().omp.max_threads() : static_cast<int>(std::thread::hardware_concurrency());
  return n < 1 ? 1 : n;
}

void run_on_threads(void (*fn)(void *), void *data, int threads) {
  Call call{fn, data};
  if (threads <= 1 || inside) return worker(&call);
  if (use_openmp()) {
    if (runtime().omp.in_parallel()) return worker(&call);
    return runtime().omp.parallel(worker, &call, static_cast<unsigned>(threads), 0);
  }
#ifdef __APPLE__
  if (!in_forked_child.load(std::memory_order_relaxed)) {
    // The system's own pool.  It may run fewer at once than asked; whoever comes late finds nothing left to take.
    return dispatch_apply_f(static_cast<size_t>(threads), DISPATCH_APPLY_AUTO, &call,
                            [](void *c, size_t) { worker(c); });
  }
#endif
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads - 1));
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(worker, static_cast<void *>(&call));
  } catch (const std::system_error &) {
    // No more threads to be had: those that started, and this one, do the work.
  }
  worker(&call);
  for (std::thread &t : others) t.join();
}

void Shares::wait() const {
  for (int spins = 0; !all_done(); ++spins) {
    if (spins > 2000) sched_yield();   // more threads than cores: let the one that holds the work run
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#endif
  }
}

}  // namespace w8a8

extern "C" const char *w8a8_parallel_name(void) { return w8a8::use_openmp() ? w8a8::runtime().name.c_str() : "threads"; }
