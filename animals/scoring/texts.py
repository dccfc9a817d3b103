"""Every sentence of the pages, in English and in Chinese: report, contact sheet, audit, index, --serve.

`Texts(language)(key, **values)` fills the {places} of a text; values are escaped, the texts themselves are trusted
HTML. "one|many" in an English text is chosen by the value `count`.
"""

from config import LABELS_IN_CHINESE

TEXTS = {
    "lang": ("en", "zh-CN"),
    "comma": (", ", "，"),
    "called_with": ("called {said} with {p}", "认作{said}，{p}"),
    "copy": ("{path}: click to copy the path", "{path}：点一下复制路径"),
    "copied": ("path copied", "路径已复制"),
    # --- the report: first screen
    "title": ("Validation of {model}", "{model} 的验证结果"),
    "step": ("step {step}", "第 {step} 步"),
    "wrong_of": ("{wrong} wrong of {n}", "{n} 张里认错 {wrong} 张"),
    "interval": ("95&nbsp;% interval {low} to {high}", "95&nbsp;% 置信区间 {low} 到 {high}"),
    "part_of": ("Measured on {n} of the {held_out} held-out pictures.", "只用了 {held_out} 张验证图片中的 {n} 张。"),
    "chance": ("Guessing would reach {chance}", "乱猜能对 {chance}"),
    "majority": ("always saying the most frequent animal {majority}", "总答最多的那种动物能对 {majority}"),
    "stop": (".", "。"),
    "strip": ("{point}, 95 % interval {low} to {high}", "{point}，95 % 置信区间 {low} 到 {high}"),
    "worst": ("Its most confident mistakes", "错得最自信的几张"),
    "no_mistakes": ("Every picture was named right.", "全部认对，一张没错。"),
    "parts": ("parts of this page", "本页目录"),
    "dropped": (
        "{n} correctly named or most ordinary pictures stand here by file name only, so that this page stays below "
        "15 MB; predictions.csv has them all.",
        "为了让本页不超过 15 MB，有 {n} 张认对的或最普通的图片只列文件名；predictions.csv 里一张不少。",
    ),
    # --- leaks
    "leaks": ("Has it seen these pictures before?", "这些图片它训练时见过吗？"),
    "leaks_some": (
        "{leaked} held-out pictures have a twin or a look-alike among the training pictures; without them {accuracy}.",
        "有 {leaked} 张验证图片在训练集里有相同或相似的图片；去掉它们，准确率是 {accuracy}。",
    ),
    "leaks_none": (
        "No held-out picture has a twin or a look-alike among the training pictures.",
        "没有一张验证图片与训练图片相同或相似。",
    ),
    "leaks_unknown": (
        "Not known whether held-out pictures are among the training pictures too: "
        "<code>python data_process_utils.py</code> looks for them.",
        "没有查过验证图片是否也在训练集里：运行 <code>python data_process_utils.py</code> 可以检查。",
    ),
    "leaks_detail": (
        "{identical} are identical to a training picture, {look_alikes} look like one. On the other {n}: {accuracy}, "
        "95&nbsp;% interval {low} to {high}.",
        "其中 {identical} 张与某张训练图片完全相同，{look_alikes} 张相似。其余 {n} 张上：{accuracy}，"
        "95&nbsp;% 置信区间 {low} 到 {high}。",
    ),
    "groups": (
        "The {n} held-out pictures form {groups} groups of look-alikes; the interval above counts with that, and is "
        "wider for it.",
        "{n} 张验证图片里有彼此相似的，归起来是 {groups} 组；上面的置信区间已按此放宽。",
    ),
    "suspects": ("Labels that look wrong", "可疑的标签"),
    "suspects_about": (
        "The audit doubts the label of {n} held-out picture: the given one, then the likelier.|The audit doubts the "
        "labels of {n} held-out pictures: the given one, then the likelier.",
        "标签检查对 {n} 张验证图片的标签有疑问：箭头前是原有的，后面是更像的。",
    ),
    "suspects_shown": ("{shown} are shown; audit.csv lists all.", "这里列出 {shown} 张，全部在 audit.csv 里。"),
    # --- rivals and the compared model
    "rivals": ("Was the large model worth it?", "大模型值不值？"),
    "rival": ("rival", "对手"),
    "this": ("this checkpoint", "本模型"),
    "rival_majority": ("always the most frequent animal", "总答最多的那种动物"),
    "rival_untuned": ("before fine-tuning", "微调之前"),
    "rival_probe": ("linear probe on the vision tower", "视觉塔上的线性探针"),
    "rival_clip": ("zero-shot CLIP", "零样本 CLIP"),
    "accuracy": ("accuracy", "准确率"),
    "difference_to": ("this is better by", "本模型高出"),
    "points_between": ("{low} to {high}", "{low} 到 {high}"),
    "rivals_about": (
        "On the same pictures. Differences in percentage points with 95&nbsp;% intervals; p is McNemar's exact test: "
        "below 0.05 the difference is hardly luck.",
        "都在同样的图片上。差值以百分点计，附 95&nbsp;% 置信区间；p 来自 McNemar 精确检验，低于 0.05 就不大像是运气。",
    ),
    "difference": ("Is the difference real?", "差别是真的吗？"),
    "compared_with": ("Compared with {model} ({where})", "与 {model} 相比（{where}）"),
    "better": ("Yes: this checkpoint is better.", "是真的：本模型更好。"),
    "worse": ("Yes: this checkpoint is worse.", "是真的：本模型更差。"),
    "not_established": (
        "Not established: a difference this small may be luck.",
        "还说不准：这么小的差别可能只是运气。",
    ),
    "versus": (
        "This checkpoint is right on {accuracy}, the other on {other} of the same {n} pictures: a difference of "
        "{difference} points, 95&nbsp;% interval {low} to {high}. McNemar's exact test: p {p}.",
        "同样的 {n} 张图片，本模型对 {accuracy}，对方对 {other}：相差 {difference} 个百分点，"
        "95&nbsp;% 置信区间 {low} 到 {high}。"
        "McNemar 精确检验 p {p}。",
    ),
    "worse_end": ("← worse", "← 更差"),
    "better_end": ("better →", "更好 →"),
    "who_is_right": ("Pictures by who is right", "各对了哪些图片"),
    "other_right": ("other right", "对方对"),
    "other_wrong": ("other wrong", "对方错"),
    "this_right": ("this right", "本模型对"),
    "this_wrong": ("this wrong", "本模型错"),
    "changed": ("Pictures that the two name differently", "两个模型叫法不同的图片"),
    "changed_about": (
        "{n} in all: {lost} that only the other has right, {gained} that only this one has right, {neither} that both "
        "have wrong. The other's name stands first.",
        "共 {n} 张：只有对方认对的 {lost} 张，只有本模型认对的 {gained} 张，"
        "两个都错的 {neither} 张。箭头前是对方的叫法。",
    ),
    "shown": ("{shown} are shown; report.json lists all.", "这里列出 {shown} 张，全部在 report.json 里。"),
    "other_said": ("{model} says {said}", "{model} 认作{said}"),
    # --- confusion
    "confusion": ("Which animals does it confuse?", "哪些动物会弄混？"),
    "confusion_about": (
        "A row: what the picture shows. A column: what it was called. Choose a number to see its pictures.",
        "行是图里真正的动物，列是模型的回答。点一个数字看对应的图片。",
    ),
    "pairs": ("Confused with each other", "互相弄混的"),
    "taken_for": ("{a} taken for {b}: {n}", "{a}认作{b}：{n} 张"),
    "singles": (
        "and one pair with a single picture|and {n} pairs with a single picture each",
        "另有 {n} 对各弄混 1 张",
    ),
    "no_pairs": ("No two animals were confused more than once.", "没有哪两种动物弄混过两次以上。"),
    "cell": ("{n} picture of {label} called {said}|{n} pictures of {label} called {said}", "{n} 张{label}，认作{said}"),
    "uncertain_first": ("The least certain first.", "最没把握的在前。"),
    "certain_first": ("The most certain first.", "最有把握的在前。"),
    "opens": ("Each opens the original.", "点开看原图。"),
    "back": ("Back to the matrix", "回到混淆矩阵"),
    # --- classes
    "classes": ("Class by class", "逐类来看"),
    "label": ("label", "类别"),
    "pictures": ("pictures", "张数"),
    "precision": ("precision", "精确率"),
    "recall": ("recall", "召回率"),
    "macro": ("mean of the classes", "各类平均"),
    "classes_about": (
        "Precision: of the pictures called so, how many are. Recall: of the pictures that are, how many were called "
        "so, with its 95&nbsp;% interval. F1: their harmonic mean; 0 where a label was never given.",
        "精确率：被这样叫的图片里有多少真是。召回率：真是的图片里有多少被叫对，附 95&nbsp;% 置信区间。"
        "F1：两者的调和平均；"
        "从未被回答过的类别为 0。",
    ),
    # --- certainty
    "calibration": ("Can its certainty be believed?", "它的把握可信吗？"),
    "ece": (
        "Expected calibration error {ece}: how far certainty and accuracy lie apart on average.",
        "期望校准误差 {ece}：把握与准确率平均相差这么多。",
    ),
    "ece_noise": (
        "A perfectly calibrated model would show {median} here, and more than {p99} once in a hundred times.",
        "换成校准完美的模型，这么多图片上也会测出 {median}，一百次里有一次超过 {p99}。",
    ),
    "verdict_calibrated": ("No sign that it is off.", "看不出有偏差。"),
    "verdict_over": ("It is over-confident.", "它过于自信。"),
    "verdict_under": ("It is under-confident.", "它不够自信。"),
    "verdict_miscalibrated": ("Its certainty is off.", "它的把握有偏差。"),
    "certain_axis": ("how certain it was", "有多大把握"),
    "right_axis": ("how often it was right", "对了多少"),
    "reliability": (
        "Reliability diagram: accuracy in ranges of certainty",
        "可靠性图：各段把握下的准确率",
    ),
    "bin": (
        "certainty {low} to {high}: {n} pictures, certain {confidence}, right {accuracy}",
        "把握 {low} 到 {high}：{n} 张，平均把握 {confidence}，认对 {accuracy}",
    ),
    "numbers": ("The numbers", "具体数字"),
    "certainty": ("certainty", "把握"),
    "mean_certainty": ("mean certainty", "平均把握"),
    "right": ("right", "认对"),
    "calibration_about": (
        "On the dashed line it is right as often as it is certain; below it, it is too sure of itself. The upright "
        "lines are 95&nbsp;% intervals.",
        "落在虚线上：有几分把握就对几分；低于虚线：过于自信。竖线是 95&nbsp;% 置信区间。",
    ),
    "answered": ("Answer less, be right more", "少答一些，答得更准"),
    "answered_about": (
        "Accuracy on what is still answered when <code>test.py --min_probability</code> leaves the others "
        "<i>unsure</i>.",
        "用 <code>test.py --min_probability</code> 把没把握的留作 <i>unsure</i>，剩下的有多准。",
    ),
    "at_least": ("at least", "至少"),
    "share": ("answered", "作答"),
    # --- galleries
    "mistakes_some": (
        "Mistakes, the most confident first",
        "认错的图片，最自信的在前",
    ),
    "mistakes_about": (
        "{n} in all. A confident mistake may be a wrong label: look at the picture; a click on its file name copies "
        "the path.",
        "共 {n} 张。错得很自信的，也可能是标签本身有误：看一眼图片；点文件名可复制路径。",
    ),
    "mistakes_shown": (
        "{shown} are shown, the others are in the confusion matrix.",
        "这里列出 {shown} 张，其余在混淆矩阵里。",
    ),
    "truth_said": (
        '<b>{truth}</b>, called <b class="said">{said}</b>',
        '<b>{truth}</b>，认作<b class="said">{said}</b>',
    ),
    "uncertain": ("Right, but least certain", "认对了，但最没把握的"),
    "none_right": ("No picture was named right.", "一张也没有认对。"),
    "excluded": ("Excluded pictures", "排除的图片"),
    "excluded_about": (
        "{n} held-out file could not be used and is in no number above.|{n} held-out files could not be used and are "
        "in no number above.",
        "有 {n} 个验证文件无法使用，上面的数字都不含它们。",
    ),
    "excluded_none": ("None: every held-out picture could be read.", "没有：每张验证图片都能读。"),
    "file": ("file", "文件"),
    "reason": ("reason", "原因"),
    # --- footer
    "how": (
        "{date}; {seconds} s, {speed} images/s; {dtype}, {processes} process, {batch} pictures at once on each|"
        "{date}; {seconds} s, {speed} images/s; {dtype}, {processes} processes, {batch} pictures at once on each",
        "{date}；用时 {seconds} 秒，每秒 {speed} 张；{dtype}，{processes} 个进程，每个一次 {batch} 张",
    ),
    "log_loss": ("log loss {loss}", "对数损失 {loss}"),
    "index_link": ("all reports", "全部报告"),
    # --- the contact sheet
    "sheet_title": ("Animals, as named", "认出的动物"),
    "sheet_about": (
        "{n} picture, named by <b>{model}</b> on {date}.|{n} pictures, named by <b>{model}</b> on {date}.",
        "{n} 张图片，由 <b>{model}</b> 于 {date} 辨认。",
    ),
    "sheet_unsure": ("Below {p} the name is <i>unsure</i>.", "低于 {p} 的记为 <i>unsure</i>。"),
    "sheet_dropped": (
        "{n} picture stands here by file name only, so that this page stays small.|{n} pictures stand here by file "
        "name only, so that this page stays small.",
        "为了让本页不太大，有 {n} 张只列文件名。",
    ),
    "names": ("names", "名称"),
    "look_first": ("Look at these first", "先看这些"),
    "look_first_about": ("The least certain of all.", "所有图片里最没把握的。"),
    "unsure": ("unsure", "拿不准"),
    "unreadable": ("unreadable", "读不了"),
    # --- the index
    "index_title": ("All validation reports", "全部验证报告"),
    "index_about": (
        "{n} report, rewritten by each validation.|{n} reports; this page is rewritten by each validation.",
        "共 {n} 份报告；每次验证后本页自动更新。",
    ),
    "checkpoint": ("checkpoint", "检查点"),
    "step_column": ("step", "步数"),
    "leaks_column": ("leaks", "泄漏"),
    "not_known": ("not known", "未查"),
    "curve": ("{run}: accuracy over the steps, with 95 % intervals", "{run}：准确率随步数的变化，附 95 % 置信区间"),
    "final": ("final model", "最终模型"),
    "unreadable_report": ("{path}: no readable report", "{path}：报告读不了"),
    # --- the audit
    "audit_title": ("Suspects", "可疑的图片"),
    "audit_suspects": ("Suspects among {n} pictures", "{n} 张图片里的可疑者"),
    "audit_about": (
        "By the vision tower of <b>{model}</b>. Each is a picture to look at, not a verdict; audit.csv lists all of "
        "them. A picture opens the original. First the given label, then the likely one.",
        "用 <b>{model}</b> 的视觉塔检查得出。只是提醒看一眼，不是定论；全部在 audit.csv 里。点图片看原图。"
        "箭头前是原有的标签，后面是更像的。",
    ),
    "audit_label": ("The label is likely wrong", "标签可能有误"),
    "audit_label_about": (
        "The least probable label first. Likely: what a classifier on the features says that has not seen the picture.",
        "最不像的标签在前。“更像的”来自一个没见过这张图片的分类器。",
    ),
    "audit_outlier": ("Like no other", "与众不同"),
    "audit_outlier_about": (
        "Far from their nearest neighbours: perhaps no animal, a drawing, a collage. The farthest first.",
        "离最近的图片都很远：可能没有动物，可能是图画或拼图。最远的在前。",
    ),
    "audit_look-alike": ("Look-alikes that the hashes miss", "哈希漏掉的相似图片"),
    "audit_look-alike_about": (
        "Much nearer to another picture than pictures are: crops, frames of one film. One of each set is not listed "
        "and may stay.",
        "与另一张图片近得不寻常：裁剪过的，或同一段视频的画面。每组有一张没有列出，可以留下。",
    ),
    "audit_nearest": ("nearest:", "最近的是"),
    "audit_none": ("None.", "没有。"),
    # --- test.py --serve
    "serve_title": ("Which animal is it?", "这是什么动物？"),
    "serve_about": (
        "<b>{model}</b> answers on this machine. Pictures are sent nowhere else and not kept.",
        "由本机的 <b>{model}</b> 回答。图片不会发到别处，也不保存。",
    ),
    "serve_unsure": ("Below {p} the answer is <i>unsure</i>.", "把握低于 {p} 时答“拿不准”。"),
    "serve_drop": ("Drop a picture here, paste one, or", "把图片拖到这里，或直接粘贴，或者"),
    "serve_choose": ("Choose a picture", "选一张图片"),
    "serve_camera": ("Use the camera", "用摄像头"),
    "serve_shoot": ("Take the picture", "拍照"),
    "serve_examples": ("Or try one of these:", "也可以试试这些："),
    "serve_working": ("Looking …", "正在看……"),
    "serve_gone": (
        "The server does not answer: is test.py --serve still running?",
        "服务没有回应：test.py --serve 还在运行吗？",
    ),
    "serve_no_camera": ("No camera can be used here.", "这里用不了摄像头。"),
    "serve_took": ("{width} x {height} pixels, {seconds} s", "{width} x {height} 像素，用时 {seconds} 秒"),
    "serve_bad": ("This picture cannot be used: {reason}.", "这张图片用不了：{reason}。"),
    "serve_too_large": ("The file is too large: more than {most} MB.", "文件太大：超过 {most} MB。"),
    "serve_elsewhere": (
        "Only this server's own page may ask; open {url}.",
        "只接受本服务自己的页面；请打开 {url}。",
    ),
    "serve_failed": ("The model could not answer: {reason}.", "模型没能回答：{reason}。"),
    # --- why a picture cannot be used (PictureError's categories)
    "reason_not a picture": ("not a picture", "不是图片"),
    "reason_too many pixels": ("too many pixels", "像素太多"),
    "reason_too small": ("too small", "太小"),
    "reason_empty file": ("empty file", "空文件"),
    "reason_truncated": ("truncated", "文件不完整"),
    "reason_damaged": ("damaged", "文件已损坏"),
    "reason_missing": ("missing", "文件不在了"),
    "reason_is a directory": ("is a directory", "是文件夹"),
    "reason_not a regular file": ("not a regular file", "不是普通文件"),
    "reason_too many bytes": ("too many bytes", "文件太大"),
    "reason_broken link": ("broken link", "链接已失效"),
    "reason_unreadable": ("unreadable", "无法读取"),
    "reason_name is not UTF-8": ("name is not UTF-8", "文件名不是 UTF-8"),
}


class Texts:
    """The texts of one language, `en` or `zh`."""

    def __init__(self, language):
        self.place = ("en", "zh").index(language)

    def __call__(self, key, count=None, **values):
        from markupsafe import Markup

        one, _, many = TEXTS[key][self.place].partition("|")
        return Markup(many if many and count != 1 else one).format(**values)

    def label(self, label):
        """A label's name; `unsure`'s too."""
        if label == "unsure":
            return str(self("unsure"))
        return LABELS_IN_CHINESE.get(label, label) if self.place else label

    def reason(self, text):
        """Why a picture cannot be used, after its PictureError ("category" or "category: detail")."""
        category, colon, detail = text.partition(": ")
        known = TEXTS.get(f"reason_{category}")
        return (known[self.place] if known else category) + colon + detail
