// How the noise of a likelihood estimate moves: with the parameters held, or along with them.
//
// Blocks are parts of the noise that are accepted on their own, each by its own factor of the
// estimate; where it has no factors, all noise is one block.
#include <vector>

enum Refresh { HELD, CORRELATED, STRETCHES, SLICE };
static const long MOST_SHRINKS = 1000;  // what is then left of an ellipse is where it began

// What the model says at a place: the potential, the factors of its estimate, the local sites.
struct Evaluation {
  Real value = 0;
  std::vector<Real> likelihoods = std::vector<Real>(LIKELIHOODS);
  std::vector<Real> local = std::vector<Real>(LOCALS);
};

struct NoisyWalker : Walker {
  using Walker::Walker;
  Evaluation current, other, merged;
  std::vector<Real> choices = std::vector<Real>(CHOICES);
  std::vector<Real> noise = std::vector<Real>(NOISE), fresh = noise, proposed = noise;
  std::vector<double> ratios = std::vector<double>(call.blocks), low = ratios, high = ratios;
  std::vector<double> angle = ratios, threshold = ratios;
  std::vector<Real> cosine = std::vector<Real>(call.blocks), sine = cosine;
  std::vector<char> accepted = std::vector<char>(call.blocks), done = accepted;

  // The evaluation at a place, its local sites drawn anew.
  void look(Real* at, Real* u, Random& random, Evaluation& found) {
    void* arguments[NUM_EVALUATION_INPUTS];
    std::memcpy(arguments, call.evaluation_data, sizeof(arguments));
    for (Real& choice : choices) choice = Real(random.uniform());
    arguments[0] = at, arguments[1] = u, arguments[2] = choices.data();
    void* results[NUM_RESULTS + 1] = {&found.value};
    for (long i = 0; i < NUM_RESULTS; i++) {
      auto& part = RESULTS[i].is_local ? found.local : found.likelihoods;
      results[i + 1] = part.data() + RESULTS[i].first;
    }
    evaluation_program::call(arguments, scratch, results);
  }

  // By how much each block's log estimate is larger in one evaluation than in another.
  void compare(const Evaluation& now, const Evaluation& before) {
    if (!call.factorises) ratios[0] = double(before.value) - double(now.value);
    else
      for (long i = 0; i < LIKELIHOODS; i++)
        ratios[i] = double(now.likelihoods[i]) - double(before.likelihoods[i]);
  }
  // Takes noise and evaluation of the blocks that are accepted.
  void merge(const std::vector<Real>& from, const Evaluation& now, std::vector<Real>& to,
             Evaluation& kept) const {
    for (long i = 0; i < NOISE; i++) to[i] = accepted[call.noise_blocks[i]] ? from[i] : to[i];
    for (long i = 0; i < LOCALS; i++)
      kept.local[i] = accepted[call.local_blocks[i]] ? now.local[i] : kept.local[i];
    Real gained = 0;
    for (long i = 0; i < LIKELIHOODS; i++)
      if (accepted[call.likelihood_blocks[i]]) {
        gained += now.likelihoods[i] - kept.likelihoods[i];
        kept.likelihoods[i] = now.likelihoods[i];
      }
    if (call.factorises) kept.value -= gained;
    else if (accepted[0]) kept.value = now.value;
  }
  double share(const std::vector<char>& of) const {
    double sum = 0.0;
    for (char one : of) sum += one;
    return sum / double(of.size());
  }

  // Accepts or rejects each block of what was proposed reversibly.
  double judge(Random& random) {
    look(z, proposed.data(), random, other);
    compare(other, current);
    for (long i = 0; i < call.blocks; i++)
      accepted[i] = std::log(random.uniform()) < ratios[i];  // false where the ratio is no number
    merge(proposed, other, noise, current);
    return share(accepted);
  }
  double correlated(Random& random) {
    const Real old = Real(call.correlation);
    const Real part = Real(std::sqrt(1.0 - call.correlation * call.correlation));
    random.normals(fresh.data(), NOISE);
    for (long i = 0; i < NOISE; i++) proposed[i] = old * noise[i] + part * fresh[i];
    return judge(random);
  }
  double stretches(Random& random) {
    const double offset = random.uniform();
    random.normals(fresh.data(), NOISE);
    double shares = 0.0;
    for (long k = 0; k < call.stretches; k++) {
      for (long i = 0; i < NOISE; i++) {
        const long number = long(std::floor(call.along[i] * call.stretches + Real(offset)));
        proposed[i] = number % call.stretches == k ? fresh[i] : noise[i];
      }
      shares += judge(random);
    }
    return shares / double(call.stretches);
  }
  double slice(Random& random, long& count) {
    const std::vector<Real> start = noise;
    const Evaluation first = current;
    random.normals(fresh.data(), NOISE);
    for (double& level : threshold) level = std::log(random.uniform());
    for (long i = 0; i < call.blocks; i++) {
      angle[i] = 2.0 * M_PI * random.uniform();
      low[i] = angle[i] - 2.0 * M_PI, high[i] = angle[i], done[i] = false;
    }
    for (count = 0; share(done) < 1.0 && count < MOST_SHRINKS; count++) {
      for (long i = 0; i < call.blocks; i++)
        cosine[i] = std::cos(Real(angle[i])), sine[i] = std::sin(Real(angle[i]));
      for (long i = 0, block; i < NOISE; i++) {
        block = call.noise_blocks[i];
        proposed[i] = start[i] * cosine[block] + fresh[i] * sine[block];
      }
      look(z, proposed.data(), random, other);
      compare(other, first);
      for (long i = 0; i < call.blocks; i++) accepted[i] = !done[i] && ratios[i] > threshold[i];
      merge(proposed, other, noise, current);
      for (long i = 0; i < call.blocks; i++) {
        done[i] |= accepted[i];
        (angle[i] < 0.0 ? low : high)[i] = angle[i];
        angle[i] = low[i] + (high[i] - low[i]) * random.uniform();
      }
    }
    return share(done);
  }

  // Moves the noise of a draw, the parameters held, and evaluates the gradient there.
  void refresh(Random& random, Outcome& made, long at) {
    long count = call.refresh == STRETCHES ? call.stretches : 1;
    look(z, noise.data(), random, current);
    const Real before = current.value;
    call.share[at] = call.refresh == CORRELATED  ? correlated(random)
                     : call.refresh == STRETCHES ? stretches(random)
                                                 : slice(random, count);
    inputs[1] = noise.data();
    if (call.motion == WALK) value = current.value;
    else evaluate(z, &value, gradient);
    made.energy += double(value - before);
    call.n_densities[at] += 1 + count;
  }

  // A trajectory of parameters and noise, and the test at its end.
  Outcome together(Random& random, long num_steps) {
    const Energy before = energy(current.value, here);
    copy(taken, here.z), copy(taken_gradient, here.r);
    split(num_steps);
    look(here.z, here.z + d, random, other);
    const Energy after = energy(other.value, here);
    double error = double(other.value) - double(current.value);
    error += half_squares(here.r, d) - half_squares(taken_gradient, d);
    for (long i = d; i < n; i++)
      error += 0.5 * (double(here.z[i] - taken[i]) * double(here.z[i] + taken[i]) +
                      double(here.r[i] - taken_gradient[i]) * double(here.r[i] + taken_gradient[i]));
    double rate;
    const bool taken_up = passes(random, error, rate);
    if (taken_up) copy(z, here.z), std::swap(current, other), value = current.value;
    const double own = taken_up ? after.parameters : before.parameters;
    return {rate, error, own, num_steps, error > DIVERGENCE, false, taken_up};
  }
};
