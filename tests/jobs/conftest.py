from w8a8.jobs.watching import Watcher


class Heard(Watcher):
    """Keeps what it is told."""

    def __init__(self):
        self.stages, self.notes, self.plans, self.told = [], [], [], []

    def stage(self, label):
        self.stages.append(label)
        return super().stage(label)

    def note(self, text):
        self.notes.append(text)

    def planned(self, plan, prediction):
        self.plans.append((plan, prediction))

    def made(self, made):
        self.told.append(("made", made.compared is None))

    def compared(self, made):
        self.told.append(("compared", made.compared is None))
