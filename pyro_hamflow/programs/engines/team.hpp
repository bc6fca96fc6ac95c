// Work that several threads share: each takes the next piece that nobody has taken.
#include <pthread.h>

template <class Worker>
struct Team {
  const Call& call;
  long pieces, next;

  static void* work(void* argument) {
    Team& team = *static_cast<Team*>(argument);
    Worker worker(team.call);
    for (;;) {
      const long piece = __atomic_fetch_add(&team.next, 1, __ATOMIC_RELAXED);
      if (piece >= team.pieces) return nullptr;
      worker.run(piece);
    }
  }
  static void share(const Call& call, long pieces) {
    Team team{call, pieces, 0};
    const long others = std::min(call.threads, pieces) - 1;
    pthread_t* threads = static_cast<pthread_t*>(malloc(sizeof(pthread_t) * (others + 1)));
    long started = 0;
    while (started < others && !pthread_create(threads + started, nullptr, work, &team)) started++;
    work(&team);
    for (long i = 0; i < started; i++) pthread_join(threads[i], nullptr);
    free(threads);
  }
};
