// Draws of many chains, each chain for itself, on as many threads as are asked for.

#ifdef EVALUATED
using Base = NoisyWalker;
#else
using Base = Walker;
#endif

struct Chain : Base {
  using Base::Base;

  // Takes a chain's place, and its noise.
  void place(long chain) {
    Real* own = call.noise + chain * NOISE;
    std::copy_n(call.position + chain * d, d, z);
    std::memcpy(z + d, own, sizeof(Real) * MOVING);
    inputs[1] = own;
#ifdef EVALUATED
    if (!MOVING) std::copy(own, own + NOISE, noise.begin()), inputs[1] = noise.data();
#endif
  }
  void begin(long chain) {
    place(chain);
    std::copy_n(call.gradient + chain * n, n, gradient);
    value = call.value[chain], step = call.step_sizes[chain];
#ifdef EVALUATED
    current.value = value;
    std::copy_n(call.likelihoods + chain * LIKELIHOODS, LIKELIHOODS, current.likelihoods.begin());
    std::copy_n(call.local + chain * LOCALS, LOCALS, current.local.begin());
#endif
  }
  void end(long chain) {
    std::copy_n(z, d, call.position + chain * d);
    std::copy_n(gradient, n, call.gradient + chain * n);
    call.value[chain] = value;
    std::memcpy(call.noise + chain * NOISE, z + d, sizeof(Real) * MOVING);
#ifdef EVALUATED
    if (!MOVING) std::copy(noise.begin(), noise.end(), call.noise + chain * NOISE);
    std::copy_n(current.likelihoods.begin(), LIKELIHOODS, call.likelihoods + chain * LIKELIHOODS);
    std::copy_n(current.local.begin(), LOCALS, call.local + chain * LOCALS);
#endif
  }
  // A trajectory, and what becomes of the noise.
  Outcome move(Random& random, long limit, long chain, long at) {
    launch(chain, random);
#ifdef EVALUATED
    const double* tape = call.tape ? call.tape + chain * call.tape_length : nullptr;
    if (MOVING && call.motion == STRAIGHT) {
      random.tape = tape;
      call.n_densities[at] = 1;
      return together(random, limit);
    }
#endif
    Outcome made = call.motion == DOUBLING ? doubling(random, limit)
                   : call.motion == WALK   ? walk(random)
                                           : straight(random, limit);
    call.n_densities[at] = call.motion == WALK;
#ifdef EVALUATED
    random.tape = tape;
    if (MOVING) {
      look(z, z + d, random, current);
      value = current.value, call.n_densities[at] = 1;
    } else refresh(random, made, at);
#endif
    return made;
  }
  void run(long chain) {
    begin(chain);
    for (long draw = 0; draw < call.draws; draw++) {
      Random random(call.seed, uint64_t(chain), call.first_draw + uint64_t(draw));
      const long at = chain * call.draws + draw;
      if (call.uniforms) uniforms = call.uniforms + 3 * call.points * chain;
      const Outcome made = move(random, call.num_steps[draw], chain, at);
      std::copy_n(z, d, call.positions + at * d);
      call.values[at] = value, call.rate[at] = made.rate, call.error[at] = made.error;
      call.energy[at] = made.energy, call.n_steps[at] = made.steps;
      call.diverging[at] = made.diverging, call.limited[at] = made.limited;
      call.accepted[at] = made.accepted;
#ifdef EVALUATED
      double sum = 0.0;
      for (Real factor : current.likelihoods) sum += double(factor);
      call.estimate[at] = sum;
      std::copy_n(current.local.begin(), LOCALS, call.locals + at * LOCALS);
#endif
    }
    end(chain);
  }
};

extern "C" void make_draws(const Call* call) { Team<Chain>::share(*call, call->chains); }

// Potentials and gradients of all chains.
extern "C" void evaluate(const Call* call) {
  Chain walker(*call);
  for (long chain = 0; chain < call->chains; chain++) {
    walker.place(chain);
    walker.evaluate(walker.z, call->value + chain, call->gradient + chain * Walker::n);
  }
}

#ifdef EVALUATED
// What the model says of all chains.
extern "C" void look(const Call* call) {
  Chain walker(*call);
  for (long chain = 0; chain < call->chains; chain++) {
    Random random(0, 0, 0);
    random.tape = call->tape + chain * CHOICES;
    walker.place(chain);
    walker.look(walker.z, static_cast<Real*>(walker.inputs[1]), random, walker.current);
    walker.value = walker.current.value;
    walker.end(chain);
  }
}
#endif
