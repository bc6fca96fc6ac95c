// What trees of one chain and of several share: their limits, and whether they turn back.
static const double DIVERGENCE = 1000.0;
static const double MOST_GAINED = 100.0;  // of which the exponential is no large number

// Whether the subtree that begins at a mark and ends at a point turns back, or its halves do where
// they meet.
//
// starts, previous, sums: in a row for each mark, the momenta of the point that begins there and of
//     that before it, and the sum of all before it.
// sum, end: the sum up to the point, and its momenta.
static inline __attribute__((always_inline)) bool turned(
    long mark, const Real* starts, const Real* previous, const Real* sums, const Real* sum,
    const Real* end) {
  const long ROW = Triangle::ROW;
  const Real *start = starts + mark * ROW, *middle = start + ROW;
  const Real *last = previous + (mark + 1) * ROW, *low = sums + mark * ROW, *high = low + ROW;
  Lanes products[6] = {};
  for (long i = 0; i < ROW; i += LANES) {
    const Lanes begun = lanes(low + i), met = lanes(high + i), now = lanes(sum + i);
    const Lanes first = lanes(middle + i), before = lanes(last + i);
    const Lanes left = met - begun + first, right = now - met + before;
    const Lanes all = now - begun, one = lanes(start + i), other = lanes(end + i);
    const Lanes pairs[6][2] = {{one, all},    {other, all},    {one, left},
                               {first, left}, {before, right}, {other, right}};
    for (long k = 0; k < 6; k++) products[k] = plus_product(products[k], pairs[k][0], pairs[k][1]);
  }
  bool found = false;
  for (const Lanes& product : products) found |= total<LANES>(product) <= 0;
  return found;
}
