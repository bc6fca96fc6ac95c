// Draws of several chains side by side: each number of a vector belongs to a chain of its own.
//
// A step of the integrator moves all of them at once. They do not wait for each other: each is at a
// point of a tree of its own, and where that ends its next one begins. What trees keep of momenta
// lies in memory chain by chain.
struct SideBySide {
  static const long d = DIMENSION, ROW = Triangle::ROW;
  using Wide = Vector<double, WIDTH>::Type;
  using Which = decltype(Numbers{} < Numbers{});
  using WideWhich = decltype(Wide{} < Wide{});
  struct alignas(64) Place {
    Numbers z[d], r[ROW], s[d];  // position, whitened momentum, whitened gradient
  };
  // Of which chains something is so: a bit for each, as vectors that are read right after their
  // numbers were written one by one wait for the memory.
  struct Flags {
    int64_t bits = 0;
    bool any() const { return bits; }
    bool has(long k) const { return bits >> k & 1; }
    void set(long k, bool is_so) { bits |= int64_t(is_so) << k; }
    WideWhich all() const {
      const WideWhich places = {1, 2, 4, 8};
      return (places & bits) != 0;
    }
  };
  // A chain's tree: which draw it is for, and its next point, counted from one.
  struct Tree {
    Random random{0, 0, 0};
    long draw = 0, number = 1;
    const double* uniforms = nullptr;
    bool active = false, forwards = true;
    double uniform(int which) { return uniforms ? uniforms[which] : random.uniform(); }
  };

  const Call& call;
  gradient_program::Data data;
  Real* memory;
  // Where chains are, where trees are and their other ends, and what they would take: of the first
  // and the last without momenta.
  Place now = {}, here = {}, other = {}, taken = {};
  Tree trees[WIDTH];
  // Momenta in rows, one for each chain, or one for each of its marks: see `turned`.
  Real *starts, *previous, *sums, *momenta, *latest, *last, *sum;
  Numbers value = {}, step = {}, time = {}, value_taken = {};
  // Weights of points are multiples of exp(level), which moves up where they would become too large.
  Wide level = {}, weight = {}, candidate = {}, rates = {}, energy_before = {};
  Wide error_taken = {}, energy_taken = {}, error_kept = {}, energy_kept = {};
  Flags begins, completes, keeps, ends;
  alignas(64) double chances[WIDTH] = {};
  long first = 0, count = 0;  // the chain in the first place, and how many there are

  explicit SideBySide(const Call& call) : call(call) {
    gradient_program::prepare(call.data, data);
    const long rows = 3 * call.slots + 4, size = rows * ROW * WIDTH;
    memory = static_cast<Real*>(aligned_alloc(64, (size * sizeof(Real) + 63) / 64 * 64));
    std::fill_n(memory, size, Real(0));
    Real* free = memory;
    for (Real** part : {&starts, &previous, &sums}) *part = free, free += call.slots * ROW * WIDTH;
    for (Real** part : {&momenta, &latest, &last, &sum}) *part = free, free += ROW * WIDTH;
  }
  ~SideBySide() { ::free(memory); }

  template <class Vector, class Number>
  static Vector together(const Number* numbers) {
    static_assert(sizeof(Vector) == WIDTH * sizeof(Number), "one number for each chain");
    return *reinterpret_cast<const Vector*>(numbers);
  }
  static Which narrow(WideWhich which) { return __builtin_convertvector(which, Which); }
  static Wide wide(Numbers x) { return __builtin_convertvector(x, Wide); }
  static bool any(WideWhich which) {
    int64_t found = 0;
    for (long k = 0; k < WIDTH; k++) found |= which[k];
    return found;
  }
  template <class V, class W>
  static void take(W which, V& to, V from) { to = which ? from : to; }
  static void take(Which which, Numbers* to, const Numbers* from) {
    for (long i = 0; i < d; i++) take(which, to[i], from[i]);
  }
  static void exchange(Which which, Numbers* one, Numbers* other) {
    for (long i = 0; i < d; i++) {
      const Numbers first = one[i], second = other[i];
      one[i] = which ? second : first, other[i] = which ? first : second;
    }
  }
  // Four vectors of four numbers each as rows, or as columns if they are rows.
  static void turn(const Numbers (&from)[4], Numbers (&to)[4]) {
    const Numbers a = __builtin_shufflevector(from[0], from[1], 0, 4, 2, 6);
    const Numbers b = __builtin_shufflevector(from[0], from[1], 1, 5, 3, 7);
    const Numbers c = __builtin_shufflevector(from[2], from[3], 0, 4, 2, 6);
    const Numbers e = __builtin_shufflevector(from[2], from[3], 1, 5, 3, 7);
    to[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    to[1] = __builtin_shufflevector(b, e, 0, 1, 4, 5);
    to[2] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    to[3] = __builtin_shufflevector(b, e, 2, 3, 6, 7);
  }
  // Momenta as rows, one for each chain; and back.
  static void as_rows(const Numbers* r, Real* rows) {
    for (long i = 0; i < ROW; i += WIDTH) {
      Numbers part[4];
      turn(reinterpret_cast<const Numbers(&)[4]>(r[i]), part);
      for (long k = 0; k < WIDTH; k++) *reinterpret_cast<Numbers*>(rows + k * ROW + i) = part[k];
    }
  }
  static void from_rows(const Real* rows, Numbers* r) {
    for (long i = 0; i < ROW; i += WIDTH) {
      Numbers part[4];
      for (long k = 0; k < WIDTH; k++)
        part[k] = *reinterpret_cast<const Numbers*>(rows + k * ROW + i);
      turn(part, reinterpret_cast<Numbers(&)[4]>(r[i]));
    }
  }

  // The root, a lower triangle or a diagonal, times a vector; or its transpose. Sums of all rows go
  // on together, for one alone would wait for itself.
  template <bool TRANSPOSED>
  void root_times(const Numbers* x, Numbers* out) const {
    if (!call.dense) {
      for (long i = 0; i < d; i++) out[i] = call.root[i] * x[i];
      return;
    }
    Numbers sums[d] = {};
#pragma GCC unroll 16
    for (long i = 0; i < d; i++)
#pragma GCC unroll 16
      for (long j = TRANSPOSED ? 0 : i; j < (TRANSPOSED ? i + 1 : d); j++) {
        const Real factor = call.root[TRANSPOSED ? i * d + j : j * d + i];
        sums[j] = plus_product(sums[j], Numbers{factor, factor, factor, factor}, x[i]);
      }
#pragma GCC unroll 16
    for (long i = 0; i < d; i++) out[i] = sums[i];
  }
  void kick(Place& p) const {
    const Numbers half = Real(-0.5) * time;
    for (long i = 0; i < d; i++) p.r[i] = plus_product(p.r[i], half, p.s[i]);
  }
  // A leapfrog step; returns the potential, and what momenta were in `former`.
  __attribute__((noinline)) Numbers leap(Place& p, Numbers* former) const {
    Numbers found, slope[d], way[d];
    for (long i = 0; i < d; i++) former[i] = p.r[i];
    kick(p);
    root_times<false>(p.r, way);
    for (long i = 0; i < d; i++) p.z[i] = plus_product(p.z[i], time, way[i]);
    gradient_program::call(data, p.z, &found, slope);
    root_times<true>(slope, p.s);
    kick(p);
    return found;
  }
  static Wide half_squares(const Numbers* r) {
    Wide sums[2] = {};
    for (long i = 0; i < d; i++) sums[i % 2] = plus_product(sums[i % 2], wide(r[i]), wide(r[i]));
    return 0.5 * (sums[0] + sums[1]);
  }

  // Takes the places of chains; where there is none, a copy of the first stands still.
  void place(long group) {
    first = group * WIDTH, count = std::min(WIDTH, call.chains - first);
    for (long k = 0; k < WIDTH; k++)
      for (long i = 0; i < d; i++)
        now.z[i][k] = call.position[(first + (k < count ? k : 0)) * d + i];
  }
  void begin(long group) {
    place(group);
    Numbers slope[d];
    for (long k = 0; k < WIDTH; k++) {
      const long chain = first + (k < count ? k : 0);
      for (long i = 0; i < d; i++) slope[i][k] = call.gradient[chain * d + i];
      value[k] = call.value[chain], step[k] = k < count ? call.step_sizes[chain] : Real(0);
      trees[k] = Tree();
    }
    root_times<true>(slope, now.s);
  }
  void end() {
    Numbers found, slope[d];
    gradient_program::call(data, now.z, &found, slope);
    for (long k = 0; k < count; k++) {
      for (long i = 0; i < d; i++) {
        call.position[(first + k) * d + i] = now.z[i][k];
        call.gradient[(first + k) * d + i] = slope[i][k];
      }
      call.value[first + k] = value[k];
    }
  }
  // Random numbers of a chain's draw, and the momenta it begins with.
  void launch(long k, long draw) {
    Tree& tree = trees[k];
    const long chain = first + k;
    tree.random.begin(call.seed, uint64_t(chain), call.first_draw + uint64_t(draw));
    tree.uniforms = call.uniforms ? call.uniforms + 3 * call.points * chain : nullptr;
    tree.draw = draw, tree.number = 1, tree.active = tree.forwards = true;
    Real* own = momenta + k * ROW;
    if (call.momenta) std::copy_n(call.momenta + chain * d, d, own);
    else tree.random.normals(own, d);
    std::fill(own + d, own + ROW, Real(0));  // numbers are made in pairs
    begins.set(k, true);
  }
  void keep(long k, double rate, double error, double energy, long steps) {
    const long at = (first + k) * call.draws + trees[k].draw;
    for (long i = 0; i < d; i++) call.positions[at * d + i] = now.z[i][k];
    call.values[at] = value[k], call.rate[at] = rate, call.error[at] = error;
    call.energy[at] = energy, call.n_steps[at] = steps;
  }

  // Trajectories of so many steps, and the tests at their ends.
  void lines() {
    time = step;
    for (long draw = 0; draw < call.draws; draw++) {
      for (long k = 0; k < count; k++) launch(k, draw);
      std::copy_n(now.z, d, here.z), std::copy_n(now.s, d, here.s);
      from_rows(momenta, here.r);
      const Wide before = half_squares(here.r);
      Numbers found = value, former[d];
      for (long i = 0; i < call.num_steps[draw]; i++) found = leap(here, former);
      const Wide after = half_squares(here.r);
      Wide error = (wide(found) - wide(value)) + (after - before);
      take(error != error, error, Wide{} + INFINITY);
      for (long k = 0; k < count; k++) chances[k] = trees[k].uniform(0);
      const Wide rate = exp(error > 0.0 ? -error : Wide{});
      const WideWhich passes = together<Wide>(chances) < rate;
      const Which accepted = narrow(passes);
      take(accepted, now.z, here.z), take(accepted, now.s, here.s), take(accepted, value, found);
      const Wide energy = wide(value) + (passes ? after : before);
      for (long k = 0; k < count; k++) {
        keep(k, rate[k], error[k], energy[k], call.num_steps[draw]);
        const long at = (first + k) * call.draws + draw;
        call.diverging[at] = error[k] > DIVERGENCE, call.accepted[at] = passes[k];
      }
    }
  }

  // Trajectories that double until they turn back.
  void doublings() {
    for (long k = 0; k < count && call.draws > 0; k++) launch(k, 0);
    for (long num_active = call.draws > 0 ? count : 0; num_active > 0;) {
      if (begins.any()) begin_trees();
      double_trees();
      std::swap(last, latest);
      Numbers former[d];
      const Numbers found = leap(here, former);
      as_rows(here.r, latest);
      const Wide error = weigh(found);
      const Which pairs = pairs_turn(former, here.r);
      for (long k = 0; k < WIDTH; k++)
        if (trees[k].active) look_back(k, error[k] > DIVERGENCE, pairs[k]);
      if (completes.any()) complete_trees();
      if (!ends.any()) continue;
      for (long k = 0; k < count; k++) {
        Tree& tree = trees[k];
        if (!ends.has(k)) continue;
        call.accepted[(first + k) * call.draws + tree.draw] = error_kept[k] != 0.0;
        keep(k, rates[k] / tree.number, error_kept[k], energy_kept[k], tree.number);
        if (tree.draw + 1 < call.draws) launch(k, tree.draw + 1);
        else tree.active = false, tree.uniforms = nullptr, step[k] = time[k] = Real(0), num_active--;
      }
      ends = Flags();
    }
  }
  void begin_trees() {
    const WideWhich begun = begins.all();
    const Which which = narrow(begun);
    Numbers fresh[ROW];
    from_rows(momenta, fresh);
    for (Place* place : {&here, &other})
      take(which, place->z, now.z), take(which, place->r, fresh), take(which, place->s, now.s);
    const Wide energy = wide(value) + half_squares(here.r);
    take(begun, energy_before, energy), take(begun, energy_kept, energy);
    take(begun, weight, Wide{} + 1.0), take(which, time, step);
    for (Wide* sum : {&level, &rates, &error_kept}) take(begun, *sum, Wide{});
    for (long k = 0; k < count; k++) {
      if (!begins.has(k)) continue;
      const long mark = k * call.slots * ROW;
      for (Real* row : {latest + k * ROW, sum + k * ROW, starts + mark})
        copy_numbers(row, momenta + k * ROW, ROW);
      std::fill_n(sums + mark, ROW, Real(0));
    }
    begins = Flags();
  }
  // Trees that are complete grow to one side by as many points as they have: `here` is the end that
  // they grow at, or is exchanged for the other one, where the first mark is. The first point that
  // they grow by is taken whatever its weight is.
  void double_trees() {
    Flags doubles, turns;
    for (long k = 0; k < count; k++) {
      Tree& tree = trees[k];
      const bool complete = (tree.number & (tree.number - 1)) == 0;
      const double number = tree.uniform(!complete);
      const bool forwards = complete ? number < 0.5 : tree.forwards;
      const bool turned = forwards != tree.forwards;
      chances[k] = complete ? 0.0 : number;
      const decltype(Lanes{} < Lanes{}) which = decltype(which){} - turned;
      Real *own = latest + k * ROW, *opposite = starts + k * call.slots * ROW;
      for (long i = 0; i < ROW; i += LANES) {
        const Lanes one = lanes(own + i), other = lanes(opposite + i);
        lanes(own + i) = which ? other : one, lanes(opposite + i) = which ? one : other;
      }
      doubles.set(k, complete), turns.set(k, turned);
      tree.forwards = forwards;
    }
    take(doubles.all(), candidate, Wide{});
    if (!turns.any()) return;
    const Which turned = narrow(turns.all());
    exchange(turned, here.z, other.z), exchange(turned, here.r, other.r);
    exchange(turned, here.s, other.s), take(turned, time, -time);
  }
  // Takes a point, or does not, by its weight; returns by how much its energy has grown.
  Wide weigh(Numbers found) {
    const Wide energy = wide(found) + half_squares(here.r);
    Wide error = energy - energy_before;
    take(error != error, error, Wide{} + INFINITY);
    const WideWhich gains = -error > level + MOST_GAINED;
    Wide own;
    if (any(gains || level != 0.0)) {
      const Wide factor = exp(gains ? level + error : Wide{});
      weight *= factor, candidate *= factor, take(gains, level, -error);
      own = exp(-error - level), rates += exp(error > 0.0 ? -error : Wide{});
    } else own = exp(-error), rates += own < 1.0 ? own : Wide{} + 1.0;
    candidate += own;
    const WideWhich takes = together<Wide>(chances) * candidate < own;
    const Which which = narrow(takes);
    take(which, taken.z, here.z), take(which, taken.s, here.s), take(which, value_taken, found);
    take(takes, error_taken, error), take(takes, energy_taken, energy);
    return error;
  }
  // Whether two points, one after the other, turn back by their momenta.
  static Which pairs_turn(const Numbers* one, const Numbers* other) {
    Numbers products[2] = {};
    for (long i = 0; i < d; i++) {
      const Numbers both = one[i] + other[i];
      products[0] = plus_product(products[0], one[i], both);
      products[1] = plus_product(products[1], other[i], both);
    }
    return products[0] <= 0 || products[1] <= 0;
  }
  // What a chain's latest point is to its tree: whether a subtree that ends there turns back, whether
  // the tree is complete and whether it ends.
  void look_back(long k, bool diverging, bool pair_turns) {
    Tree& tree = trees[k];
    const long number = tree.number, rows = k * call.slots * ROW;
    const long ones = __builtin_popcountl(number), trailing = __builtin_ctzl(~number);
    const Real* end = latest + k * ROW;
    if (!trailing) {  // larger subtrees begin at points of even numbers, and so do their halves
      copy_numbers(starts + rows + ones * ROW, end, ROW);
      copy_numbers(previous + rows + ones * ROW, last + k * ROW, ROW);
      copy_numbers(sums + rows + ones * ROW, sum + k * ROW, ROW);
    }
    add_times(sum + k * ROW, Real(1), end, ROW);
    const bool complete = (number & (number + 1)) == 0;
    bool broken = diverging || (pair_turns && trailing && number > 1);
    bool back = pair_turns && number == 1, limited = false;
    for (long mark = ones - 2; mark >= ones - trailing && !broken; mark--)
      (mark ? broken : back) =
          turned(mark, starts + rows, previous + rows, sums + rows, sum + k * ROW, end);
    if (complete && !broken) {
      keeps.set(k, tree.uniform(2) * weight[k] < candidate[k]);
      completes.set(k, true);
      limited = !back && 2 * number + 1 > call.num_steps[tree.draw];
    }
    if (tree.uniforms) tree.uniforms += 3;
    if (broken || limited || (complete && back)) {
      const long at = (first + k) * call.draws + tree.draw;
      call.diverging[at] = diverging, call.limited[at] = limited;
      ends.set(k, true);
    } else tree.number++;
  }
  void complete_trees() {
    const WideWhich kept = keeps.all();
    const Which which = narrow(kept);
    take(which, now.z, taken.z), take(which, now.s, taken.s), take(which, value, value_taken);
    take(kept, error_kept, error_taken), take(kept, energy_kept, energy_taken);
    take(completes.all(), weight, weight + candidate);
    completes = keeps = Flags();
  }

  void run(long group) {
    begin(group);
    call.motion == DOUBLING ? doublings() : lines();
    end();
  }
  // Potentials and gradients of chains.
  void evaluate(long group) {
    place(group);
    Numbers slope[d];
    gradient_program::call(data, now.z, &value, slope);
    for (long k = 0; k < count; k++) {
      call.value[first + k] = value[k];
      for (long i = 0; i < d; i++) call.gradient[(first + k) * d + i] = slope[i][k];
    }
  }
};

extern "C" void make_draws(const Call* call) {
  Team<SideBySide>::share(*call, (call->chains + WIDTH - 1) / WIDTH);
}
extern "C" void evaluate(const Call* call) {
  SideBySide sides(*call);
  for (long group = 0; group * WIDTH < call->chains; group++) sides.evaluate(group);
}
