// Draws of many chains by Hamiltonian trajectories, each chain for itself.
//
// Momenta are whitened: N(0, I), with velocities and gradients times the root of the inverse mass.
// The tree is that of the package's torch transitions: points numbered from the start, marks of
// the points that begin balanced subtrees, in the slot that their number of binary ones names.
#include <pthread.h>

static const double DIVERGENCE = 1000.0;

// Counter-based random numbers: Salmon et al. (2011), Philox4x32 with ten rounds. A stream is a
// function of seed, chain and draw alone.
struct Random {
  uint32_t key[2], place[4];
  uint64_t ready[2];
  int left = 0;

  Random(uint64_t seed, uint64_t chain, uint64_t draw) {
    key[0] = uint32_t(seed), key[1] = uint32_t(seed >> 32);
    place[0] = 0, place[1] = uint32_t(chain);
    place[2] = uint32_t(draw), place[3] = uint32_t(draw >> 32);
  }
  void fill() {
    uint32_t c[4] = {place[0]++, place[1], place[2], place[3]}, k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
      const uint64_t first = uint64_t(0xD2511F53u) * c[0], second = uint64_t(0xCD9E8D57u) * c[2];
      const uint32_t c1 = c[1], c3 = c[3];
      c[0] = uint32_t(second >> 32) ^ c1 ^ k0, c[1] = uint32_t(second);
      c[2] = uint32_t(first >> 32) ^ c3 ^ k1, c[3] = uint32_t(first);
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    ready[0] = uint64_t(c[1]) << 32 | c[0], ready[1] = uint64_t(c[3]) << 32 | c[2];
    left = 2;
  }
  double uniform() {  // between zero and one, neither included
    if (!left) fill();
    return (double(ready[2 - left--] >> 12) + 0.5) * 0x1.0p-52;
  }
  void normals(Real* out, long n) {
    for (long i = 0; i < n; i += 2) {
      const double radius = std::sqrt(-2.0 * std::log(uniform())), angle = 2.0 * M_PI * uniform();
      out[i] = Real(radius * std::cos(angle));
      if (i + 1 < n) out[i + 1] = Real(radius * std::sin(angle));
    }
  }
};

// What one call is to do; the package's Python has the same.
struct Call {
  long chains, draws, noise_dimension, slots, dense, turning, threads, points;
  uint64_t seed, first_draw;
  void* const* data;
  const Real *root, *step_sizes, *noise, *momenta;
  const double* uniforms;
  const long* num_steps;
  Real *position, *value, *gradient, *positions, *values;
  double *rate, *error, *energy;
  long* n_steps;
  bool *diverging, *limited, *accepted;
};

static inline double log_add(double a, double b) {
  const double top = a > b ? a : b;
  return std::isinf(top) ? top : top + std::log1p(std::exp(-std::fabs(a - b)));
}

static inline Real dot(const Real* a, const Real* b, long n) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (long i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

// A point: position, whitened momentum, whitened gradient.
struct Point {
  Real *z, *r, *s;
};

struct Outcome {
  double rate, error, energy;
  long steps;
  bool diverging, limited, accepted;
};

// One thread's memory, and the chain that it holds at the time.
struct Walker {
  static const long n = DIMENSION;
  const Call& call;
  Real *memory, *free;
  char* scratch;
  void** inputs;
  Point here, ends[2];
  Real *z, *gradient, *taken, *taken_gradient, *there, *last, *sum, *starts, *previous, *sums;
  Real value, taken_value, step;
  const double* uniforms = nullptr;

  explicit Walker(const Call& call) : call(call) {
    const size_t bytes = sizeof(Real) * (16 + 3 * call.slots) * (n + 16) + gradient_scratch + 256;
    memory = free = static_cast<Real*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
    inputs = static_cast<void**>(malloc(sizeof(void*) * NUM_INPUTS));
    std::memcpy(inputs, call.data, sizeof(void*) * NUM_INPUTS);
    for (Point* point : {&here, &ends[0], &ends[1]})
      point->z = vector(1), point->r = vector(1), point->s = vector(1);
    for (Real** part : {&z, &gradient, &taken, &taken_gradient, &there, &last, &sum})
      *part = vector(1);
    for (Real** part : {&starts, &previous, &sums}) *part = vector(call.slots);
    scratch = reinterpret_cast<char*>(free);
  }
  ~Walker() { ::free(memory), ::free(inputs); }

  Real* vector(long rows) {
    Real* made = free;
    free += (rows * n + 15) / 16 * 16;
    return made;
  }
  void copy(Real* to, const Real* from) const { std::memcpy(to, from, n * sizeof(Real)); }
  void copy(const Point& to, const Point& from) const {
    copy(to.z, from.z), copy(to.r, from.r), copy(to.s, from.s);
  }
  void evaluate(Real* at, Real* value, Real* slope) {
    inputs[0] = at;
    void* results[2] = {value, slope};
    gradient_of(inputs, scratch, results);
  }
  double kinetic(const Real* r) const {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += double(r[i]) * double(r[i]);
    return 0.5 * sum;
  }
  // The gradient times the root, a lower triangle.
  void whiten(const Real* slope, Real* out) const {
    if (!call.dense) {
      for (long i = 0; i < n; i++) out[i] = call.root[i] * slope[i];
      return;
    }
    for (long j = 0; j < n; j++) out[j] = 0;
    for (long i = 0; i < n; i++) {
      const Real factor = slope[i], *row = call.root + i * n;
#pragma omp simd
      for (long j = 0; j <= i; j++) out[j] += factor * row[j];
    }
  }
  void kick(const Point& p, Real time) const {
    for (long i = 0; i < n; i++) p.r[i] -= time * p.s[i];
  }
  void drift(const Point& p, Real time) const {
    if (!call.dense)
      for (long i = 0; i < n; i++) p.z[i] += time * (call.root[i] * p.r[i]);
    else
      for (long i = 0; i < n; i++) p.z[i] += time * dot(call.root + i * n, p.r, i + 1);
  }
  // A leapfrog step; returns the potential, and leaves the plain gradient in `there`.
  Real leap(const Point& p, Real time) {
    Real found;
    kick(p, Real(0.5) * time);
    drift(p, time);
    evaluate(p.z, &found, there);
    whiten(there, p.s);
    kick(p, Real(0.5) * time);
    return found;
  }
  double uniform(Random& random, int which) const {
    return uniforms ? uniforms[which] : random.uniform();
  }
  void begin(long chain, Random& random) {
    if (call.momenta) copy(here.r, call.momenta + chain * n);
    else random.normals(here.r, n);
    copy(here.z, z);
    whiten(gradient, here.s);
  }

  // A trajectory of so many steps, and the test at its end.
  Outcome straight(Random& random, long num_steps) {
    const double before = kinetic(here.r), old = value;
    Real found = value;
    for (long i = 0; i < num_steps; i++) found = leap(here, step);
    const double after = kinetic(here.r);
    double error = (double(found) - old) + (after - before);
    if (std::isnan(error)) error = INFINITY;
    const double rate = std::exp(-std::max(error, 0.0));
    const bool accepted = uniform(random, 0) < rate;
    if (accepted) copy(z, here.z), copy(gradient, there), value = found;
    const double energy = double(value) + (accepted ? after : before);
    return {rate, error, energy, num_steps, error > DIVERGENCE, false, accepted};
  }

  // Whether the subtree that begins at a mark and ends here turns back, or its halves do where
  // they meet.
  bool turned(long mark) const {
    const Real *start = starts + mark * n, *middle = start + n, *end = here.r;
    const Real *last = previous + (mark + 1) * n, *low = sums + mark * n, *high = low + n;
    Real t0 = 0, t1 = 0, t2 = 0, t3 = 0, t4 = 0, t5 = 0;
#pragma omp simd reduction(+ : t0, t1, t2, t3, t4, t5)
    for (long i = 0; i < n; i++) {
      const Real whole = sum[i] - low[i];
      const Real left = high[i] - low[i] + middle[i], right = sum[i] - high[i] + last[i];
      t0 += start[i] * whole, t1 += end[i] * whole;
      t2 += start[i] * left, t3 += middle[i] * left;
      t4 += last[i] * right, t5 += end[i] * right;
    }
    return (t0 <= 0) | (t1 <= 0) | (t2 <= 0) | (t3 <= 0) | (t4 <= 0) | (t5 <= 0);
  }

  // A trajectory that doubles until it turns back.
  Outcome doubling(Random& random, long limit) {
    copy(ends[0], here), copy(ends[1], here), copy(sum, here.r);
    std::memset(sums, 0, n * sizeof(Real));
    const double first = double(value) + kinetic(here.r);
    double log_weight = 0.0, candidate_weight = 0.0, rate_sum = 0.0;
    double error_taken = 0.0, energy_taken = 0.0, kept_error = 0.0, kept_energy = first;
    bool forwards = true;
    for (long number = 1;; number++) {
      if ((number & (number - 1)) == 0) {
        forwards = uniform(random, 0) < 0.5;
        copy(here, ends[forwards]);
        copy(starts, ends[!forwards].r);
        candidate_weight = -INFINITY;
      }
      copy(last, here.r);
      const Real found = leap(here, forwards ? step : -step);
      const double energy = double(found) + kinetic(here.r);
      double error = energy - first;
      if (std::isnan(error)) error = INFINITY;
      const bool diverging = error > DIVERGENCE;
      rate_sum += std::exp(-std::max(error, 0.0));
      candidate_weight = log_add(candidate_weight, -error);
      if (std::log(uniform(random, 1)) < -error - candidate_weight) {
        copy(taken, here.z), copy(taken_gradient, there);
        taken_value = found, error_taken = error, energy_taken = energy;
      }
      const long ones = __builtin_popcountl(number), trailing = __builtin_ctzl(~number);
      copy(starts + ones * n, here.r);
      copy(previous + ones * n, last);
      copy(sums + ones * n, sum);
      for (long i = 0; i < n; i++) sum[i] += here.r[i];
      const bool complete = (number & (number + 1)) == 0;
      bool broken = diverging, back = false;
      for (long mark = ones - 1; mark >= ones - trailing && !broken; mark--)
        (mark ? broken : back) = turned(mark);
      bool limited = false;
      if (complete && !broken) {
        if (std::log(uniform(random, 2)) < candidate_weight - log_weight) {
          std::swap(z, taken), std::swap(gradient, taken_gradient);
          value = taken_value, kept_error = error_taken, kept_energy = energy_taken;
        }
        log_weight = log_add(log_weight, candidate_weight);
        copy(ends[forwards], here);
        limited = !back && 2 * number + 1 > limit;
      }
      if (uniforms) uniforms += 3;
      if (broken || limited || (complete && back)) {
        const bool moved = kept_error != 0.0;
        return {rate_sum / number, kept_error, kept_energy, number, diverging, limited, moved};
      }
    }
  }

  void run(long chain) {
    copy(z, call.position + chain * n), copy(gradient, call.gradient + chain * n);
    value = call.value[chain], step = call.step_sizes[chain];
    inputs[1] = const_cast<Real*>(call.noise + chain * call.noise_dimension);
    for (long draw = 0; draw < call.draws; draw++) {
      Random random(call.seed, uint64_t(chain), call.first_draw + uint64_t(draw));
      const long at = chain * call.draws + draw, limit = call.num_steps[draw];
      if (call.uniforms) uniforms = call.uniforms + 3 * call.points * chain;
      begin(chain, random);
      const Outcome made = call.turning ? doubling(random, limit) : straight(random, limit);
      copy(call.positions + at * n, z);
      call.values[at] = value, call.rate[at] = made.rate, call.error[at] = made.error;
      call.energy[at] = made.energy, call.n_steps[at] = made.steps;
      call.diverging[at] = made.diverging, call.limited[at] = made.limited;
      call.accepted[at] = made.accepted;
    }
    copy(call.position + chain * n, z), copy(call.gradient + chain * n, gradient);
    call.value[chain] = value;
  }
};

// Each thread takes the next chain that nobody has taken.
struct Team {
  const Call& call;
  long next;
};

static void* work(void* argument) {
  Team& team = *static_cast<Team*>(argument);
  Walker walker(team.call);
  for (;;) {
    const long chain = __atomic_fetch_add(&team.next, 1, __ATOMIC_RELAXED);
    if (chain >= team.call.chains) return nullptr;
    walker.run(chain);
  }
}

extern "C" void make_draws(const Call* call) {
  Team team{*call, 0};
  pthread_t* others = static_cast<pthread_t*>(malloc(sizeof(pthread_t) * call->threads));
  long started = 0;
  while (started < call->threads - 1 && !pthread_create(others + started, nullptr, work, &team))
    started++;
  work(&team);
  for (long i = 0; i < started; i++) pthread_join(others[i], nullptr);
  free(others);
}

// Potentials and gradients of all chains.
extern "C" void evaluate(const Call* call) {
  Walker walker(*call);
  for (long chain = 0; chain < call->chains; chain++) {
    walker.inputs[1] = const_cast<Real*>(call->noise + chain * call->noise_dimension);
    Real* at = call->position + chain * DIMENSION;
    walker.evaluate(at, call->value + chain, call->gradient + chain * DIMENSION);
  }
}
