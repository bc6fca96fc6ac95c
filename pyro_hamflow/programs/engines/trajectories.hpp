// Hamiltonian trajectories of one chain.
//
// Momenta are whitened: N(0, I), with velocities and gradients times the root of the inverse mass.
// The tree is that of the package's torch transitions: points numbered from the start, marks of
// the points that begin balanced subtrees, in the slot that their number of binary ones names.
static const double DIVERGENCE = 1000.0;
static const double MOST_GAINED = 100.0;  // of which the exponential is no large number

// A point: position, whitened momentum, whitened gradient; of the parameters, and behind them of the
// noise, where it moves with them.
struct Point {
  Real *z, *r, *s;
};

// The Hamiltonian; and its part without the noise's own energy.
struct Energy {
  double total, parameters;
};

struct Outcome {
  double rate, error, energy;
  long steps;
  bool diverging, limited, accepted;
};

// A square matrix of few numbers times a vector, its sums in registers: rows times the vector's
// numbers, added up. What is written is as long as a row, with its gap.
struct Square {
  static const long LANES = 4, PARTS = (DIMENSION + LANES - 1) / LANES, ROW = PARTS * LANES;
  static const bool FITS = DIMENSION <= 24;
  typedef Real Lanes __attribute__((vector_size(LANES * sizeof(Real)), aligned(sizeof(Real))));
  static void times(const Real* rows, const Real* x, Real* out) {
    Lanes sums[PARTS ? PARTS : 1] = {};
    for (long j = 0; j < DIMENSION; j++) {
      const Lanes* row = reinterpret_cast<const Lanes*>(rows + j * ROW);
#pragma GCC unroll 8
      for (long part = 0; part < PARTS; part++) sums[part] += x[j] * row[part];
    }
    std::memcpy(out, sums, ROW * sizeof(Real));
  }
};

// Adds numbers times a factor. What is read and what is written lie apart: both are vectors.
static inline __attribute__((always_inline)) void add_times(
    Real* __restrict to, Real factor, const Real* __restrict from, long count) {
  for (long i = 0; i < count; i++) to[i] += factor * from[i];
}

// One thread's memory, and the chain that it holds at the time.
struct Walker {
  static const long d = DIMENSION, n = DIMENSION + MOVING;
  const Call& call;
  Real *memory, *free;
  char* scratch;
  void** inputs;
  Point here, ends[2];
  Real *z, *gradient, *taken, *taken_gradient, *there, *last, *sum, *starts, *previous, *sums;
  Real *rows, *columns;  // of the root, where it is a matrix of few numbers
  Real value, taken_value, step;
  const double* uniforms = nullptr;

  explicit Walker(const Call& call) : call(call) {
    const size_t bytes = sizeof(Real) * (16 + 3 * call.slots + 2 * Square::ROW) * (n + 16) +
                         SCRATCH + 256;
    memory = free = static_cast<Real*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
    inputs = static_cast<void**>(malloc(sizeof(void*) * NUM_INPUTS));
    std::memcpy(inputs, call.data, sizeof(void*) * NUM_INPUTS);
    for (Point* point : {&here, &ends[0], &ends[1]})
      point->z = vector(1), point->r = vector(1), point->s = vector(1);
    for (Real** part : {&z, &gradient, &taken, &taken_gradient, &there, &last, &sum})
      *part = vector(1);
    for (Real** part : {&starts, &previous, &sums}) *part = vector(call.slots);
    for (Real** part : {&rows, &columns}) *part = vector(Square::ROW);
    std::fill(rows, columns + Square::ROW * d, Real(0));
    for (long i = 0; is_square() && i < d; i++)
      for (long j = 0; j < d; j++)
        rows[i * Square::ROW + j] = columns[j * Square::ROW + i] = call.root[i * d + j];
    scratch = reinterpret_cast<char*>(free);
  }
  bool is_square() const { return Square::FITS && call.dense; }
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
  void note(Real* to, const Real* from) const { std::memcpy(to, from, d * sizeof(Real)); }
  void evaluate(Real* at, Real* value, Real* slope) {
    inputs[0] = at;
    if (MOVING) inputs[1] = at + d;
    void* results[3] = {value, slope, slope + d};
    gradient_program::call(inputs, scratch, results);
  }
  static inline __attribute__((always_inline)) double half_squares(const Real* r, long count) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < count; i++) sum += double(r[i]) * double(r[i]);
    return 0.5 * sum;
  }
  inline __attribute__((always_inline)) Energy energy(Real potential, const Point& p) const {
    const double own = double(potential) + half_squares(p.r, d);
    return {own + half_squares(p.z + d, MOVING) + half_squares(p.r + d, MOVING), own};
  }
  // The gradient times the root, a lower triangle.
  void whiten(const Real* __restrict slope, Real* __restrict out) const {
    if (is_square()) Square::times(rows, slope, out);
    for (long i = d; i < n; i++) out[i] = slope[i];
    if (is_square()) return;
    if (!call.dense) {
      const Real* __restrict root = call.root;
      for (long i = 0; i < d; i++) out[i] = root[i] * slope[i];
      return;
    }
    for (long j = 0; j < d; j++) out[j] = 0;
    for (long i = 0; i < d; i += 4) {  // beyond the diagonal there are zeros
      const long rows = std::min(4L, d - i);
      add_rows(call.root + i * d, d, rows, slope + i, 1, i + rows, out);
    }
  }
  void kick(const Point& p, Real time) const {
    add_times(p.r, -time, p.s, n);
  }
  static void scale_into(
      Real* __restrict z, Real time, const Real* __restrict root, const Real* __restrict r) {
    for (long i = 0; i < d; i++) z[i] += time * (root[i] * r[i]);
  }
  // Positions move with their momenta, and the noise turns about the origin.
  void drift(const Point& p, Real time) const {
    if (!call.dense) scale_into(p.z, time, call.root, p.r);
    if (is_square()) {
      Real way[Square::ROW + 1];
      Square::times(columns, p.r, way);
      add_times(p.z, time, way, d);
    }
    for (long i = 0; call.dense && !is_square() && i < d; i += 4) {
      const long rows = std::min(4L, d - i);
      Real sums[4];
      products(call.root + i * d, d, rows, p.r, i + rows, sums);
      for (long k = 0; k < rows; k++) p.z[i + k] += time * sums[k];
    }
    if (!MOVING) return;
    const Real cosine = std::cos(time), sine = std::sin(time);
    for (long i = d; i < n; i++) {
      const Real u = p.z[i], spin = p.r[i];
      p.z[i] = u * cosine + spin * sine, p.r[i] = spin * cosine - u * sine;
    }
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
  // So many kicks with drifts between them and halves of drifts about them: the way alone.
  void split(long num_steps) {
    Real found;
    drift(here, Real(0.5) * step);
    for (long i = 1; i <= num_steps; i++) {
      evaluate(here.z, &found, there);
      whiten(there, here.s);
      kick(here, step);
      drift(here, i < num_steps ? step : Real(0.5) * step);
    }
  }
  double uniform(Random& random, int which) const {
    return uniforms ? uniforms[which] : random.uniform();
  }
  void launch(long chain, Random& random) {
    if (call.momenta) copy(here.r, call.momenta + chain * n);
    else random.normals(here.r, n);
    copy(here.z, z);
    whiten(gradient, here.s);
  }

  // Metropolis's test, by how much the energy has grown.
  bool passes(Random& random, double& error, double& rate) const {
    if (std::isnan(error)) error = INFINITY;
    rate = std::exp(-std::max(error, 0.0));
    return uniform(random, 0) < rate;
  }

  // A trajectory of so many steps, and the test at its end.
  Outcome straight(Random& random, long num_steps) {
    const double before = half_squares(here.r, d), old = value;
    Real found = value;
    for (long i = 0; i < num_steps; i++) found = leap(here, step);
    const double after = half_squares(here.r, d);
    double rate, error = (double(found) - old) + (after - before);
    const bool accepted = passes(random, error, rate);
    if (accepted) copy(z, here.z), copy(gradient, there), value = found;
    const double energy = double(value) + (accepted ? after : before);
    return {rate, error, energy, num_steps, error > DIVERGENCE, false, accepted};
  }

  // A step of a random walk, which follows no gradient, and its test.
  Outcome walk(Random& random) {
    Real found;
    drift(here, step);
    evaluate(here.z, &found, there);
    double rate, error = double(found) - double(value);
    const bool accepted = passes(random, error, rate);
    if (accepted) copy(z, here.z), value = found;
    return {rate, error, double(value), 0, false, false, accepted};
  }

  // Whether the subtree that begins at a mark and ends here turns back, or its halves do where
  // they meet.
  bool turned(long mark) const {
    const Real *start = starts + mark * d, *middle = start + d, *end = here.r;
    const Real *last = previous + (mark + 1) * d, *low = sums + mark * d, *high = low + d;
    Real t0 = 0, t1 = 0, t2 = 0, t3 = 0, t4 = 0, t5 = 0;
#pragma omp simd reduction(+ : t0, t1, t2, t3, t4, t5)
    for (long i = 0; i < d; i++) {
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
    copy(ends[0], here), copy(ends[1], here), note(sum, here.r);
    std::memset(sums, 0, d * sizeof(Real));
    const Energy first = energy(value, here);
    // Weights are multiples of exp(level), which moves up where they would become too large.
    double level = 0.0, weight = 1.0, candidate_weight = 0.0, rate_sum = 0.0;
    double error_taken = 0.0, energy_taken = 0.0, kept_error = 0.0, kept_energy = first.parameters;
    bool forwards = true;
    for (long number = 1;; number++) {
      if ((number & (number - 1)) == 0) {
        forwards = uniform(random, 0) < 0.5;
        copy(here, ends[forwards]);
        note(starts, ends[!forwards].r);
        candidate_weight = 0.0;
      }
      note(last, here.r);
      const Real found = leap(here, forwards ? step : -step);
      const Energy reached = energy(found, here);
      double error = reached.total - first.total;
      if (std::isnan(error)) error = INFINITY;
      const bool diverging = error > DIVERGENCE;
      if (-error > level + MOST_GAINED) {
        const double factor = std::exp(level + error);
        weight *= factor, candidate_weight *= factor, level = -error;
      }
      const double own = std::exp(-error - level);
      rate_sum += level == 0.0 ? std::min(own, 1.0) : std::exp(-std::max(error, 0.0));
      candidate_weight += own;
      if (uniform(random, 1) * candidate_weight < own) {
        copy(taken, here.z), copy(taken_gradient, there);
        taken_value = found, error_taken = error, energy_taken = reached.parameters;
      }
      const long ones = __builtin_popcountl(number), trailing = __builtin_ctzl(~number);
      note(starts + ones * d, here.r);
      note(previous + ones * d, last);
      note(sums + ones * d, sum);
      add_times(sum, Real(1), here.r, d);
      const bool complete = (number & (number + 1)) == 0;
      bool broken = diverging, back = false;
      for (long mark = ones - 1; mark >= ones - trailing && !broken; mark--)
        (mark ? broken : back) = turned(mark);
      bool limited = false;
      if (complete && !broken) {
        if (uniform(random, 2) * weight < candidate_weight) {
          std::swap(z, taken), std::swap(gradient, taken_gradient);
          value = taken_value, kept_error = error_taken, kept_energy = energy_taken;
        }
        weight += candidate_weight;
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
};
