// Hamiltonian trajectories of one chain.
//
// Momenta are whitened: N(0, I), with velocities and gradients times the root of the inverse mass.
// The tree is that of the package's torch transitions: points numbered from the start, marks of
// the points that begin balanced subtrees, in the slot that their number of binary ones names.
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

// One thread's memory, and the chain that it holds at the time.
struct Walker {
  static const long d = DIMENSION, n = DIMENSION + MOVING;
  // With the zeros behind them: all numbers, those of parameters, and these in rows of their own.
  static const long ALL = whole(n), OWN = MOVING ? d : ALL, ROW = Triangle::ROW;
  const Call& call;
  Real *memory, *free;
  char* scratch;
  void** inputs;
  Point here, ends[2];
  Real *z, *gradient, *taken, *taken_gradient, *there, *last, *sum, *starts, *previous, *sums;
  Real *rows, *columns;  // of the root, where it is a diagonal or a matrix of few numbers
  Real value, taken_value, step;
  const double* uniforms = nullptr;

  explicit Walker(const Call& call) : call(call) {
    const size_t bytes = sizeof(Real) * (16 + 3 * call.slots + 2 * ROW) * (n + 16) +
                         SCRATCH + 256;
    memory = free = static_cast<Real*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
    inputs = static_cast<void**>(malloc(sizeof(void*) * NUM_INPUTS));
    std::memcpy(inputs, call.data, sizeof(void*) * NUM_INPUTS);
    for (Point* point : {&here, &ends[0], &ends[1]})
      point->z = vector(1), point->r = vector(1), point->s = vector(1);
    for (Real** part : {&z, &gradient, &taken, &taken_gradient, &there, &last, &sum})
      *part = vector(1);
    for (Real** part : {&starts, &previous, &sums}) *part = vector(call.slots);
    for (Real** part : {&rows, &columns}) *part = vector(Triangle::FITS ? ROW : 1);
    if (call.root && !call.dense) std::copy_n(call.root, d, rows);
    for (long i = 0; is_small() && i < d; i++)
      for (long j = 0; j < d; j++)
        rows[i * ROW + j] = columns[j * ROW + i] = call.root[i * d + j];
    scratch = reinterpret_cast<char*>(free);
  }
  bool is_small() const { return Triangle::FITS && call.dense; }
  ~Walker() { ::free(memory), ::free(inputs); }

  Real* vector(long rows) {
    Real* made = free;
    free += (rows * ALL + 15) / 16 * 16;
    std::fill(made, free, Real(0));
    return made;
  }
  static void copy(Real* to, const Real* from) { copy_numbers(to, from, ALL); }
  // Copies where that is so: few numbers without a branch, which nothing foretells.
  static void take(bool is_so, Real* to, const Real* from) {
    if (ALL <= FEW) copy(to, is_so ? from : to);
    else if (is_so) copy(to, from);
  }
  static void copy(const Point& to, const Point& from) {
    copy(to.z, from.z), copy(to.r, from.r), copy(to.s, from.s);
  }
  static void note(Real* to, const Real* from) { copy_numbers(to, from, OWN); }
  void evaluate(Real* at, Real* value, Real* slope) {
    inputs[0] = at;
    if (MOVING) inputs[1] = at + d;
    void* results[3] = {value, slope, slope + d};
    gradient_program::call(inputs, scratch, results);
  }
  inline __attribute__((always_inline)) Energy energy(Real potential, const Point& p) const {
    const double own = double(potential) + half_squares(p.r, OWN);
    return {own + half_squares(p.z + d, MOVING) + half_squares(p.r + d, MOVING), own};
  }
  // The gradient times the root, a lower triangle.
  void whiten(const Real* __restrict slope, Real* __restrict out) const {
    if (!call.dense)
      for (long i = 0; i < ROW; i += LANES) lanes(out + i) = lanes(rows + i) * lanes(slope + i);
    else if (is_small()) Triangle::times<true>(rows, slope, out);
    else {
      std::fill_n(out, d, Real(0));
      for (long i = 0; i < d; i += 4) {  // beyond the diagonal there are zeros
        const long rows = std::min(4L, d - i);
        add_rows(call.root + i * d, d, rows, slope + i, 1, i + rows, out);
      }
    }
    for (long i = d; i < n; i++) out[i] = slope[i];
  }
  void kick(const Point& p, Real time) const {
    add_times(p.r, -time, p.s, ALL);
  }
  void scale_into(Real* __restrict z, Real time, const Real* __restrict r) const {
    long i = 0;
    for (; i + LANES <= OWN; i += LANES)
      lanes(z + i) += time * (lanes(rows + i) * lanes(r + i));
    for (; i < OWN; i++) z[i] += time * (rows[i] * r[i]);
  }
  // Positions move with their momenta, and the noise turns about the origin.
  void drift(const Point& p, Real time) const {
    if (!call.dense) scale_into(p.z, time, p.r);
    if (is_small()) {
      Real way[ROW + 1];
      Triangle::times<false>(columns, p.r, way);
      add_times(p.z, time, way, OWN);
    }
    for (long i = 0; call.dense && !is_small() && i < d; i += 4) {
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
    if (call.momenta) std::copy_n(call.momenta + chain * n, n, here.r);
    else random.normals(here.r, n);
    std::fill(here.r + n, here.r + ALL, Real(0));  // what was no number may have come there
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

  // A trajectory that doubles until it turns back.
  Outcome doubling(Random& random, long limit) {
    copy(ends[0], here), copy(ends[1], here), note(sum, here.r);
    std::fill_n(sums, ROW, Real(0));
    const Energy first = energy(value, here);
    // Weights are multiples of exp(level), which moves up where they would become too large.
    double level = 0.0, weight = 1.0, candidate_weight = 0.0, rate_sum = 0.0;
    double error_taken = 0.0, energy_taken = 0.0, kept_error = 0.0, kept_energy = first.parameters;
    bool forwards = true;
    for (long number = 1;; number++) {
      const bool doubles = (number & (number - 1)) == 0;
      if (doubles) {
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
      const double chance = doubles ? 0.0 : uniform(random, 1);  // the first point is taken
      const bool takes = chance * candidate_weight < own;
      take(takes, taken, here.z), take(takes, taken_gradient, there);
      taken_value = takes ? found : taken_value, error_taken = takes ? error : error_taken;
      energy_taken = takes ? reached.parameters : energy_taken;
      const long ones = __builtin_popcountl(number), trailing = __builtin_ctzl(~number);
      note(starts + ones * ROW, here.r);
      note(previous + ones * ROW, last);
      note(sums + ones * ROW, sum);
      add_times(sum, Real(1), here.r, OWN);
      const bool complete = (number & (number + 1)) == 0;
      bool broken = diverging, back = false;
      for (long mark = ones - 1; mark >= ones - trailing && !broken; mark--)
        (mark ? broken : back) = turned(mark, starts, previous, sums, sum, here.r);
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
