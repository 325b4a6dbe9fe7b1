def score_pictures(pictures, scenes): raise NotImplementedError
